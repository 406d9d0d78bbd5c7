"""The verbs that measure: `eval` and `score`."""

import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from onevoice.cli.training import visible_device
from onevoice.cli.using import EvalConfigFile, load_eval_config
from onevoice.errors import ConfigError

GROUP = Group("Measure", sort_key=1.5)
"""The heading of these verbs in the help."""
Jobs = Annotated[int | None, Parameter(name=["--jobs", "--j", "-j"])]
Output = Annotated[Path | None, Parameter(name=["--output", "--o", "-o"])]
MetricNames = Annotated[list[str] | None, Parameter(consume_multiple=True)]
Listen = Annotated[list[str] | None, Parameter(consume_multiple=True)]


def eval_(
    *,
    checkpoint: Annotated[str | None, Parameter(name=["--checkpoint", "--pretrained", "--resume", "--r", "-r"])] = None,
    baseline: Literal["mixture", "irm", "psm"] | None = None,
    config: EvalConfigFile = None,
    folder: Annotated[
        Path | None, Parameter(name=["--folder", "-t", "--test-data-dir", "--test-data-folder", "--t"])
    ] = None,
    batch_size: Annotated[int | None, Parameter(name=["--batch-size", "--b", "-b"])] = None,
    jobs: Jobs = None,
    output: Output = None,
    save_estimates: Path | None = None,
    limit: int | None = None,
    metrics: MetricNames = None,
    genders: Path | None = None,
    listen: Listen = None,
    asr: str | None = None,
    texts: Path | None = None,
    sample_rate: int | None = None,
    device: Annotated[str | None, Parameter(name=["--device", "-d"])] = None,
    engine: str = "local",
    address: str | None = None,
    shard: str | None = None,
) -> None:
    """Score a checkpoint on trials: SI-SDR, SI-SDRi, PESQ, STOI, failures and confusions.

    With --output, a killed evaluation resumes where it stopped with the same command.

    Args:
        checkpoint: The weights to score: a published NAME, a PATH (usually a run's best.safetensors), or
            hf://OWNER/REPO.
        baseline: Score a baseline instead of weights: the mixture itself, or an upper bound that sees the target, the
            ideal ratio mask (irm) or the phase-sensitive mask (psm).
        config: A JSON file with defaults for the options below, such as configs/test_config.json; or a training
            config, whose validation trials are then the default.
        folder: The folder of trials: mix/, refs/ and targets/, or NAME-mixed.wav, -ref.wav and -target.wav.
        batch_size: Trials per pass of the network. It changes the speed, not the numbers.
        jobs: Processes for the metrics; by default one per core.
        output: Write the result to this JSON file, and one row per trial to a CSV file beside it; with the ending
            .parquet, the rows in that format, and the JSON file beside them.
        save_estimates: Also write every estimate to this folder, as NAME.wav in 32-bit float.
        limit: Use only the first trials, by name.
        metrics: Any of si_sdr, si_sdr_improvement, sdr, pesq, stoi, estoi.
        genders: A CSV or JSONL table with the columns speaker and gender (F or M), to group trials by.
        listen: What else listens: similarity, whether the estimate sounds like the enrollment or like the interferer;
            dnsmos, how clean it sounds without a reference (needs onevoice[dnsmos]).
        asr: A recognizer as MODULE:NAME, a function (samples, sample rate) -> text, for word error rates (needs
            onevoice[asr] and --texts); modules in the current folder are found.
        texts: A CSV or JSONL table with the columns trial and text: what is said in each trial.
        sample_rate: For a baseline: the rate in Hz to score at, by default that of the trials.
        device: Where to run the network: cpu, cuda, cuda:1, mps or the number of a GPU; auto takes the fastest one
            available.
        engine: Where the work is done: local, or ray for a Ray cluster, where --jobs is the number of workers, each
            with the network (needs onevoice[ray]); --device cuda gives each a GPU.
        address: The address of the cluster, or auto; by default RAY_ADDRESS, or a new one on this machine.
        shard: With --output, score only the part I of N equal parts, as I/N: for job arrays. The same command without
            it then joins the parts.
    """
    from onevoice.cluster import Cluster, choose_workers
    from onevoice.evaluation import run
    from onevoice.evaluation.provenance import describe_model
    from onevoice.extraction.extractor import load
    from onevoice.files import parse_shard
    from onevoice.trials import open_trials, place_of
    from onevoice.trials.export import own_rate

    if (checkpoint is None) == (baseline is None):
        fault = "is missing" if checkpoint is None else "cannot be scored together with --baseline"
        raise ConfigError(f"--checkpoint: {fault}; see onevoice eval --help")
    if sample_rate is not None and baseline is None:
        raise ConfigError("--sample-rate: belongs to --baseline; a network is scored at its own rate")
    settings = _settings(
        config, folder, batch_size=batch_size, jobs=jobs, limit=limit, metrics=metrics, device=device, genders=genders,
        listen=listen, asr=asr, texts=texts,
    )  # fmt: skip
    _check_output(output, settings)
    part = parse_shard(shard)
    if part is not None and output is None:
        raise ConfigError("--shard: needs --output, where the rows of the shard are kept")
    gpus = int(settings.device.startswith("cuda"))
    workers = choose_workers(engine, address, settings.jobs or None, 0, "jobs", gpus)
    cluster = workers if isinstance(workers, Cluster) else None
    if checkpoint is None:
        assert baseline is not None, "one of them is set"
        make = functools.partial(run.baseline, baseline, sample_rate or own_rate(open_trials(settings.trials)))
        estimator = make()
        about: dict[str, Any] = {"baseline": baseline}
        model = about
    else:
        make = functools.partial(run.load_network, checkpoint, settings.model, settings.device)
        extractor = load(checkpoint, settings.model, "cpu" if cluster else settings.device)
        estimator, model = run.network(extractor), describe_model(extractor)
        about = {"checkpoint": checkpoint, "facts": dict(extractor.card.facts)}
    title = f"{checkpoint or f'baseline {baseline}'} on {place_of(settings.trials)}"
    spread = run.Spread(cluster, make, part)
    _judge(estimator, settings, title, output, save_estimates, about, model, spread)


def score(
    estimates: Path,
    trials: Path | None = None,
    *,
    config: EvalConfigFile = None,
    jobs: Jobs = None,
    output: Output = None,
    limit: int | None = None,
    metrics: MetricNames = None,
    genders: Path | None = None,
    listen: Listen = None,
    asr: str | None = None,
    texts: Path | None = None,
    sample_rate: int | None = None,
) -> None:
    """Score the estimates of any other program: onevoice score ESTIMATES TRIALS.

    Args:
        estimates: The folder of the estimates: NAME.wav or NAME.flac for each trial NAME, as long as its mixture.
        trials: The folder of trials: mix/, refs/ and targets/, or NAME-mixed.wav, -ref.wav and -target.wav.
        config: A JSON file for eval that names the trials, instead of TRIALS, and defaults for the options below.
        jobs: Processes for the metrics; by default one per core.
        output: Write the result to this JSON file, and one row per trial to a CSV file beside it; with the ending
            .parquet, the rows in that format, and the JSON file beside them.
        limit: Use only the first trials, by name.
        metrics: Any of si_sdr, si_sdr_improvement, sdr, pesq, stoi, estoi.
        genders: A CSV or JSONL table with the columns speaker and gender (F or M), to group trials by.
        listen: What else listens, as for eval: similarity, dnsmos.
        asr: A recognizer as MODULE:NAME, for word error rates, as for eval.
        texts: A CSV or JSONL table with the columns trial and text: what is said in each trial.
        sample_rate: The rate in Hz to score at, which the estimates must have; by default that of the trials.
    """
    from onevoice.evaluation.estimates import open_estimates
    from onevoice.trials import place_of

    settings = _settings(
        config, trials, jobs=jobs, limit=limit, metrics=metrics, genders=genders, listen=listen, asr=asr, texts=texts
    )
    _check_output(output, settings)
    found = open_estimates(estimates, settings.trials, sample_rate)
    about = {"estimates": str(estimates)}
    title = f"{estimates} on {place_of(settings.trials)}"
    _judge(found.estimator, settings, title, output, None, about, {**about, "files_hash": found.files_hash})


def _settings(config: Path | None, folder: Path | None, **options: Any) -> Any:
    """Return the settings of an evaluation: those of a config, overridden by options that are not None."""
    from onevoice.config import from_dict, to_dict
    from onevoice.evaluation.run import EvaluationConfig

    settings = EvaluationConfig() if config is None else load_eval_config(config)
    if "device" in options:
        options["device"] = visible_device(options["device"])
    chosen = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in {"folder": folder, **options}.items()
        if value is not None
    }
    if folder is not None:
        chosen["data"] = None
    settings = from_dict(EvaluationConfig, {**to_dict(settings), **chosen}, name="options")
    if settings.folder is None and settings.data is None:
        raise ConfigError("no trials to score; name a folder of trials with -t FOLDER, or as `folder` in the config")
    return settings


def _check_output(output: Path | None, settings: Any) -> None:
    """Raise before any work if a file cannot be written or a package is missing."""
    from onevoice.evaluation.results import require_format, rows_path_of
    from onevoice.evaluation.run import require_metrics
    from onevoice.files import require_writable

    if output is not None:
        require_format(rows_path_of(output))
        require_writable(output)
    require_metrics(settings.metrics)


def _judge(
    estimator: Any,
    settings: Any,
    title: str,
    output: Path | None,
    save_estimates: Path | None,
    about: dict[str, Any],
    model: dict[str, Any],
    spread: Any = None,
) -> None:
    """Judge the estimates, print the summary and write the result; of a shard, keep the rows in its journal."""
    from onevoice.evaluation.journal import Journal
    from onevoice.evaluation.provenance import describe_recipe, describe_software
    from onevoice.evaluation.run import Keeping, Spread, judge, require_rate
    from onevoice.evaluation.summary import format_report, save_report
    from onevoice.extraction.discovery import ENCODER
    from onevoice.trials import to_record

    require_rate(settings.metrics, estimator.sample_rate)
    journal = None
    provenance: dict[str, Any] = {}
    if output is not None:
        provenance = {
            "estimator": model,
            "sample_rate": estimator.sample_rate,
            "recipe": describe_recipe(settings.trials),
            "batch_size": settings.batch_size,
            "software": describe_software(),
        }
        listening = {name: getattr(settings, name) for name in ("listen", "asr", "texts") if getattr(settings, name)}
        if listening:
            provenance["listening"] = {**listening, "encoder": ENCODER}
        chosen = ("metrics", "genders")
        asked = {"data": to_record(settings.trials), **{name: getattr(settings, name) for name in chosen}}
        estimates = None if save_estimates is None else str(save_estimates)
        shard = None if spread is None else spread.shard
        journal = Journal(output, {**provenance, **asked, "save_estimates": estimates}, shard)
    report = judge(estimator, settings, keeping=Keeping(journal, save_estimates), spread=spread or Spread())
    if journal is not None and journal.problem is not None:
        print(f"onevoice: not resumable: {journal.problem}", file=sys.stderr)
    if journal is not None and spread is not None and spread.shard is not None:
        print(f"{journal.path}: {len(report.trials)} trials; when all shards are done, run this without --shard")
        return
    print(title)
    print(format_report(report))
    if output is not None and journal is not None:
        saved = {} if save_estimates is None else {"saved_estimates": str(save_estimates)}
        about = {**about, **saved, "data": to_record(settings.trials), "provenance": provenance}
        rows = save_report(report, output, about)
        journal.remove()
        print(f"written: {output.with_suffix('.json')}, {rows}")
