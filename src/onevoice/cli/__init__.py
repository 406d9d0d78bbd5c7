"""The command `onevoice` and, under `train` and `eval`, the two scripts of the original system.

Each verb is a thin function over the package; what it needs is imported when it runs, so that help is instant.
A user's mistake ends in one line on standard error and exit status 2, never in a traceback.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from onevoice.cli.corpus import corpus_app
from onevoice.errors import CheckpointError, ConfigError, CorpusError, OnevoiceError

app = App(
    name="onevoice",
    help="Target speaker extraction: a recording of several people and a few seconds of one of them in, "
    "that one voice out.",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
app.command(corpus_app)
Set = Annotated[
    list[str] | None,
    Parameter(name=["--set", "-s"], consume_multiple=True, help="Override a key of the config: a.b.c=VALUE."),
]

Pretrained = Annotated[str | None, Parameter(name=["--pretrained", "--checkpoint"])]
"""Weights by NAME, PATH or hf://…; the default ones when not given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with `argv` (the process's arguments by default) and exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(" ".join(str(error).split()))
    except OnevoiceError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}; check the name and its permissions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@app.command
def mix(
    *corpus_and_out: Path,
    protocol: Path | None = None,
    count: int = 5000,
    snr: Annotated[list[float], Parameter(consume_multiple=True)] = [0.0, 5.0],  # noqa: B006 (cyclopts shows it in the help; never changed)
    test: bool = False,
    seed: int = 42,
    workers: int | None = None,
    sample_rate: int = 16_000,
    segment_seconds: float = 3.0,
    vad_db: float = 20.0,
    trim_db: float | None = None,
    pattern: str | None = None,
) -> None:
    """Make mixtures with their targets and enrollments: onevoice mix CORPUS OUT.

    CORPUS holds a folder for each speaker, with WAV, FLAC, Opus, Ogg or MP3 files at any depth (LibriSpeech fits).
    OUT gets NAME-mixed.wav, NAME-target.wav, NAME-ref.wav and manifest.jsonl. Interrupted and started again with the
    same options it goes on; the same seed gives the same bytes for any number of workers.

    Args:
        corpus_and_out: The corpus and the folder to write; with --protocol the folder alone.
        protocol: Write the trials of a protocol (LibriMix, WSJ0-2mix, …) instead: a JSON file, see docs/data.md.
        count: How many pairs of utterances to mix; training mixtures are cut, so one pair gives several.
        snr: Levels in dB by which the target stands above the interferer; each trial draws one.
        test: Keep full lengths instead of cutting silence and equal segments.
        seed: What all draws depend on.
        workers: Processes; one per core unless given.
        sample_rate: Rate of the written files in Hz.
        segment_seconds: Length of a training mixture.
        vad_db: In training mixtures, cut what lies this far below the loudest frame.
        trim_db: Cut leading and trailing silence so far below the loudest frame, from all three; off unless given.
        pattern: Use only files whose name matches, e.g. "*-norm.wav".
    """
    workers = workers or os.cpu_count() or 1
    if protocol is not None:
        if len(corpus_and_out) != 1:
            raise ConfigError(
                "mix --protocol FILE.json takes one folder, the one to write: the protocol names the rest"
            )
        from onevoice.trials import load_protocol, render_protocol

        print(render_protocol(load_protocol(protocol), corpus_and_out[0], workers=workers))
        return
    if len(corpus_and_out) != 2:
        raise ConfigError("mix takes two folders, the corpus and the one to write: onevoice mix CORPUS OUT")
    from onevoice.corpus.listing import scan
    from onevoice.mixing.generator import MixtureGenerator, summary_line

    corpus, out = corpus_and_out
    if out.resolve().is_relative_to(corpus.resolve()):
        raise CorpusError(
            f"{out}: lies inside the corpus {corpus}, where it would count as a speaker; name another folder"
        )
    generator = MixtureGenerator(
        scan(corpus, pattern), out, nfiles=count, test=test, randomState=seed, sample_rate=sample_rate
    )
    summary = generator.generate_mixes(
        snr_levels=snr,
        num_workers=workers,
        trim_db=trim_db,
        vad_db=vad_db,
        audioLen=segment_seconds,
    )
    print(summary_line(summary))


@app.command
def train(
    *,
    config: Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])] = None,
    resume: Annotated[Path | None, Parameter(name=["--resume", "--r", "-r"])] = None,
    load: Annotated[str | None, Parameter(name=["--load", "-l"])] = None,
    minutes: float | None = None,
    profile: int | None = None,
    set_: Set = None,
) -> None:
    """Train a model as a config says; the run is kept in RUNS_FOLDER/NAME of that config.

    Args:
        config: The experiment, a JSON file; with --resume the run's own config.json unless given.
        resume: A checkpoint of this experiment; everything goes on where it stood, to the same weights bit for bit.
        load: NAME, PATH or hf://OWNER/REPO whose weights alone are taken; training starts afresh.
        minutes: Stop cleanly at a checkpoint after so long.
        profile: Do not train: time so many steps, print a table, write it and a trace to RUN/profile, save no weights.
    """
    from onevoice.config import load_config
    from onevoice.extraction.pretrained import resolve
    from onevoice.training.distributed import group_of
    from onevoice.training.experiment import Experiment
    from onevoice.training.run import train as run

    if resume is not None and load is not None:
        raise CheckpointError("--resume and --load exclude each other: go on with a run, or start afresh from weights")
    if config is None:
        if resume is None:
            raise CorpusError(
                "name an experiment with --config FILE.json, or a run to go on with by --resume CHECKPOINT"
            )
        config = resume.parent / "config.json"
    weights = None if load is None else resolve(load)
    experiment = load_config(Experiment, config, set_ or [])
    if profile is not None:
        if minutes is not None:
            raise ConfigError("--profile and --minutes exclude each other: a profile ends after its steps")
        from onevoice.training.profile import profile_training

        profile_training(experiment, profile, load=resume or weights)
        return
    folder = run(experiment, resume=resume, load=weights, minutes=minutes)
    if group_of(os.environ).first:
        print(f"run folder: {folder} (best.safetensors is the one to use)")


@app.command(name="eval")
def eval_(
    *,
    checkpoint: Annotated[str, Parameter(name=["--checkpoint", "--pretrained", "--resume", "--r", "-r"])],
    config: Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])] = None,
    test_data_dir: Annotated[Path | None, Parameter(name=["--test-data-dir", "--t", "-t"])] = None,
    batch_size: Annotated[int | None, Parameter(name=["--batch-size", "--b", "-b"])] = None,
    jobs: Annotated[int | None, Parameter(name=["--jobs", "--j", "-j"])] = None,
    output: Annotated[Path | None, Parameter(name=["--output", "--o", "-o"])] = None,
    limit: int | None = None,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    device: str | None = None,
) -> None:
    """Score a checkpoint on trials: SI-SDR, PESQ, SI-SDRi, STOI, failure rate, counts.

    Args:
        checkpoint: The model to judge: NAME, PATH (usually a run's best.safetensors) or hf://OWNER/REPO.
        config: Defaults for the options below, a JSON file (configs/test_config.json).
        test_data_dir: Folder of trials: mix/, refs/, targets/, or NAME-mixed.wav, -ref.wav, -target.wav.
        batch_size: Trials per pass of the network; changes the speed, not the numbers.
        jobs: Processes for the metrics; one per core unless given.
        output: Write the result as JSON here and one row per trial as CSV beside it.
        limit: Use only the first trials by name.
        metrics: Any of si_sdr, si_sdr_improvement, sdr, pesq, stoi, estoi.
        device: Where the network runs: cpu, cuda, …; auto takes the best there is.
    """
    from onevoice.config import load_config, to_dict
    from onevoice.evaluation.summary import (
        EvaluationConfig,
        evaluate,
        format_report,
        require_metrics,
        require_rate,
        save_report,
    )
    from onevoice.extraction.extractor import load
    from onevoice.files import require_writable
    from onevoice.trials import place_of

    settings = EvaluationConfig() if config is None else load_config(EvaluationConfig, config)
    options = {
        "data_dir": None if test_data_dir is None else str(test_data_dir),
        "batch_size": batch_size,
        "jobs": jobs,
        "limit": limit,
        "metrics": metrics,
        "device": device,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    settings = _with_options(settings, chosen if test_data_dir is None else {**chosen, "data": None})
    if settings.data_dir is None and settings.data is None:
        raise CorpusError("name a folder of trials with -t FOLDER, or as data_dir in the config")
    if output is not None and output.suffix.lower() != ".json":
        raise ConfigError(f"{output}: end the name of the result in .json; the rows go into a .csv beside it")
    if output is not None:
        require_writable(output)
    require_metrics(settings.metrics)
    extractor = load(checkpoint, settings.model, settings.device)
    require_rate(settings.metrics, extractor.sample_rate)
    report = evaluate(extractor, settings)
    place = place_of(settings.protocol)
    print(f"{checkpoint} on {place}")
    print(format_report(report))
    if output is not None:
        about = {"checkpoint": checkpoint, "data": to_dict(settings.protocol), "facts": dict(extractor.card.facts)}
        rows = save_report(report, output, about)
        print(f"written: {output}, {rows}")


@app.command
def extract(
    mixture: Path,
    enrollment: Path,
    output: Path,
    *,
    pretrained: Pretrained = None,
    residual: Path | None = None,
    config: Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])] = None,
    device: str = "auto",
) -> None:
    """Extract the voice of ENROLLMENT from MIXTURE into OUTPUT, at the mixture's rate and level, mono.

    Args:
        mixture: The recording of several people: any format libsndfile reads, any rate, channels are averaged.
        enrollment: Another recording of the wanted person alone, 3 s or more (0.5 s at the least).
        output: The file to write; its ending names the format (.wav is 32-bit float).
        pretrained: NAME of published weights, PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
        residual: Also write what is left: mixture minus output.
        config: A config as for eval whose section `model` says what a .pth checkpoint is; others say so themselves.
        device: Where the network runs: cpu, cuda, …; auto takes the best there is.
    """
    from onevoice.audio import require_writable_format
    from onevoice.extraction.extractor import extract_file, load
    from onevoice.files import require_writable

    for path in (output, residual):
        if path is not None:
            require_writable_format(path)
            require_writable(path)
    extract_file(load(pretrained, _model_of(config), device), mixture, enrollment, output, residual)
    print(output)


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(name=["--out", "--output", "--o", "-o"])] = Path("onevoice-demo"),
    pretrained: Pretrained = None,
    device: str = "auto",
) -> None:
    """Extract a voice from the sample recordings that come with the package, and measure the result.

    Args:
        out: The folder to write: mixture.wav, enrollment.wav, voice.wav and residual.wav.
        pretrained: NAME of published weights, PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
        device: Where the network runs: cpu, cuda, …; auto takes the best there is.
    """
    from onevoice.evaluation.demo import run
    from onevoice.extraction.extractor import load
    from onevoice.files import require_writable

    require_writable(out / "voice.wav")
    print(run(load(pretrained, device=device), out).text())


@app.command
def info(checkpoint: str | None = None) -> None:
    """List the published weights; or print what one checkpoint says of itself: model, config, speakers, facts.

    Args:
        checkpoint: NAME, PATH or hf://OWNER/REPO; without it the list.
    """
    from onevoice.extraction.pretrained import read_registry, resolve

    if checkpoint is None:
        registry = read_registry()
        lines = [each.line(name) + " (default)" * (name == registry.default) for name, each in registry.weights.items()]
        print("\n".join(lines) or "no weights come with this installation")
        return
    from onevoice.extraction.checkpoint import load_checkpoint

    state, card = load_checkpoint(resolve(checkpoint))
    print(json.dumps({**json.loads(card.to_json()), "weights": sum(v.numel() for v in state.values())}, indent=2))


@app.command
def average(output: Path, *checkpoints: Path) -> None:
    """Write the mean of the weights of CHECKPOINTs, often better than each, to OUTPUT: onevoice average OUT A B ….

    Args:
        output: The checkpoint to write (.safetensors).
        checkpoints: Two or more checkpoints of one run, such as its epoch-NNNN.safetensors.
    """
    from onevoice.extraction.checkpoint import average_checkpoints, save_checkpoint
    from onevoice.files import require_writable

    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: end the name of the checkpoint to write in .safetensors; it comes first")
    require_writable(output)
    save_checkpoint(output, *average_checkpoints(checkpoints))
    print(output)


@app.command
def schema(kind: str = "train") -> None:
    """Print the JSON Schema of the config of `train` or `eval`, with every default.

    Args:
        kind: "train" or "eval".
    """
    from onevoice.config import json_schema
    from onevoice.evaluation.summary import EvaluationConfig
    from onevoice.training.experiment import Experiment

    kinds: dict[str, type[Any]] = {"train": Experiment, "eval": EvaluationConfig}
    if kind not in kinds:
        raise ConfigError(f"{kind}: unknown config; choose one of {', '.join(kinds)}")
    print(json.dumps(json_schema(kinds[kind]), indent=2))


def _model_of(config: Path | None) -> Any:
    """Return the section `model` of an evaluation config; None without a config."""
    if config is None:
        return None
    from onevoice.config import load_config
    from onevoice.evaluation.summary import EvaluationConfig

    return load_config(EvaluationConfig, config).model


def _with_options(settings: Any, options: dict[str, Any]) -> Any:
    from onevoice.config import from_dict, to_dict

    return from_dict(type(settings), {**to_dict(settings), **options}, name="options")


def _fail(message: str) -> None:
    print("onevoice: error:", message.replace("\n", "\\n"), file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torch's threads may wait for processes of the group that are gone
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)
