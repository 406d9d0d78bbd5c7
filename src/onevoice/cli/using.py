"""The verbs that use weights: `extract`, `demo`, `info` and `eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from onevoice.errors import ConfigError

GROUP = Group("Use weights", sort_key=1)
"""The heading of these verbs in the help."""
Pretrained = Annotated[str | None, Parameter(name=["--pretrained", "--checkpoint"])]
"""The weights to use; None for the default ones."""
EvalConfigFile = Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])]


def extract(
    mixture: Path,
    enrollment: Path,
    output: Path,
    *,
    pretrained: Pretrained = None,
    residual: Path | None = None,
    config: EvalConfigFile = None,
    device: str = "auto",
) -> None:
    """Extract the voice of ENROLLMENT from MIXTURE and write it to OUTPUT.

    OUTPUT is mono and has the sample rate and level of MIXTURE.

    Args:
        mixture: The recording of several people, in any common format and at any rate; channels are averaged.
        enrollment: Another recording, of the wanted person alone: 3 s or more is best, 0.5 s the minimum.
        output: The file to write. Its ending sets the format; .wav is 32-bit float.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        residual: Also write what is left, MIXTURE minus OUTPUT, to this file.
        config: An eval config whose `model` section describes a .pth checkpoint; other checkpoints need none.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
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


def _model_of(config: Path | None) -> Any:
    """Return the `model` section of an eval config; None without a config."""
    if config is None:
        return None
    from onevoice.config import load_config
    from onevoice.evaluation.summary import EvaluationConfig

    return load_config(EvaluationConfig, config).model


def demo(
    *,
    out: Annotated[Path, Parameter(name=["--out", "--output", "--o", "-o"])] = Path("onevoice-demo"),
    pretrained: Pretrained = None,
    device: str = "auto",
) -> None:
    """Extract a voice from the sample recordings that come with the package, and measure the result.

    Args:
        out: The folder to write; it gets mixture.wav, enrollment.wav, voice.wav and residual.wav.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.evaluation.demo import run
    from onevoice.extraction.extractor import load
    from onevoice.files import require_writable

    require_writable(out / "voice.wav")
    print(run(load(pretrained, device=device), out).text())


def info(checkpoint: str | None = None) -> None:
    """List the published weights, or print the card of a checkpoint: its model, config, speakers and facts.

    Args:
        checkpoint: A published NAME, the PATH of a checkpoint, or hf://OWNER/REPO. Leave it out to get the list.
    """
    from onevoice.extraction.checkpoint import read_registry, resolve

    if checkpoint is None:
        registry = read_registry()
        lines = [each.line(name) + " (default)" * (name == registry.default) for name, each in registry.weights.items()]
        print("\n".join(lines) or "no weights come with this installation")
        return
    from onevoice.extraction.checkpoint import load_checkpoint

    state, card = load_checkpoint(resolve(checkpoint))
    print(json.dumps({**json.loads(card.to_json()), "weights": sum(v.numel() for v in state.values())}, indent=2))


def eval_(
    *,
    checkpoint: Annotated[str, Parameter(name=["--checkpoint", "--pretrained", "--resume", "--r", "-r"])],
    config: EvalConfigFile = None,
    folder: Annotated[
        Path | None, Parameter(name=["--folder", "-t", "--test-data-dir", "--test-data-folder", "--t"])
    ] = None,
    batch_size: Annotated[int | None, Parameter(name=["--batch-size", "--b", "-b"])] = None,
    jobs: Annotated[int | None, Parameter(name=["--jobs", "--j", "-j"])] = None,
    output: Annotated[Path | None, Parameter(name=["--output", "--o", "-o"])] = None,
    limit: int | None = None,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    device: str | None = None,
) -> None:
    """Score a checkpoint on trials: SI-SDR, SI-SDRi, PESQ, STOI and failure rate.

    Args:
        checkpoint: The weights to score: a published NAME, a PATH (usually a run's best.safetensors), or
            hf://OWNER/REPO.
        config: A JSON file with defaults for the options below, such as configs/test_config.json.
        folder: The folder of trials: mix/, refs/ and targets/, or NAME-mixed.wav, -ref.wav and -target.wav.
        batch_size: Trials per pass of the network. It changes the speed, not the numbers.
        jobs: Processes for the metrics; by default one per core.
        output: Write the result to this JSON file, and one row per trial to a CSV file beside it.
        limit: Use only the first trials, by name.
        metrics: Any of si_sdr, si_sdr_improvement, sdr, pesq, stoi, estoi.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.config import from_dict, load_config, to_dict
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
    from onevoice.trials import place_of, to_record

    settings = EvaluationConfig() if config is None else load_config(EvaluationConfig, config)
    options: dict[str, Any] = {
        "folder": None if folder is None else str(folder),
        "batch_size": batch_size,
        "jobs": jobs,
        "limit": limit,
        "metrics": metrics,
        "device": device,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    if folder is not None:
        chosen["data"] = None
    settings = from_dict(EvaluationConfig, {**to_dict(settings), **chosen}, name="options")
    if settings.folder is None and settings.data is None:
        raise ConfigError("no trials to score; name a folder of trials with -t FOLDER, or as `folder` in the config")
    if output is not None:
        if output.suffix.lower() != ".json":
            raise ConfigError(f"{output}: must end in .json; the rows go into a .csv file beside it")
        require_writable(output)
    require_metrics(settings.metrics)
    extractor = load(checkpoint, settings.model, settings.device)
    require_rate(settings.metrics, extractor.sample_rate)
    report = evaluate(extractor, settings)
    print(f"{checkpoint} on {place_of(settings.trials)}")
    print(format_report(report))
    if output is not None:
        about = {"checkpoint": checkpoint, "data": to_record(settings.trials), "facts": dict(extractor.card.facts)}
        rows = save_report(report, output, about)
        print(f"written: {output}, {rows}")
