"""The verbs of training: `train`, `average` and `schema`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from onevoice.errors import ConfigError

GROUP = Group("Train", sort_key=2)
"""The heading of these verbs in the help."""


def train(
    *,
    config: Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])] = None,
    resume: Annotated[Path | None, Parameter(name=["--resume", "--r", "-r"])] = None,
    load: Annotated[str | None, Parameter(name=["--load", "-l"])] = None,
    device: Annotated[str | None, Parameter(name=["--device", "-d"])] = None,
    learning_rate: Annotated[float | None, Parameter(name=["--learning-rate", "--learning_rate", "--lr"])] = None,
    batch_size: Annotated[int | None, Parameter(name=["--batch-size", "--batch_size", "--bs"])] = None,
    minutes: float | None = None,
    profile: int | None = None,
    set_: Annotated[list[str] | None, Parameter(name=["--set", "-s"], consume_multiple=True)] = None,
) -> None:
    """Train a model from a config; the run folder is RUNS_FOLDER/NAME, both from the config.

    Args:
        config: The experiment, a JSON file. With --resume, the run's own config.json by default. A config of the
            original system is translated.
        resume: A checkpoint of this experiment. Training resumes where it stopped, to bit-identical weights. A .pth of
            the original system goes on with its weights and the moments of Adam.
        load: The weights to start from: a published NAME, a PATH or hf://OWNER/REPO. Training starts at step 0.
        device: Where to train, instead of training.device: auto, cpu, cuda, mps, or the number of a GPU.
        learning_rate: The learning rate, instead of optimizer.learning_rate and the top of a one-cycle schedule.
        batch_size: Trials per step, instead of data.batch_size.
        minutes: Stop at a checkpoint after this many minutes.
        profile: Time this many steps instead of training. Prints a table, writes it and a trace to RUN/profile, and
            saves no weights.
        set_: Override keys of the config, as a.b.c=VALUE.
    """
    from onevoice.config import from_dict, override, to_dict
    from onevoice.extraction.checkpoint import resolve
    from onevoice.training.distributed import group_from_environment
    from onevoice.training.experiment import Experiment
    from onevoice.training.original import load_experiment
    from onevoice.training.run import describe_result
    from onevoice.training.run import train as run

    if resume is not None and load is not None:
        raise ConfigError("--resume and --load exclude each other: resume a run, or start a new one from weights")
    if config is None:
        if resume is None:
            raise ConfigError("no experiment; name one with --config FILE.json, or a run with --resume CHECKPOINT")
        config = resume.parent / "config.json"
    weights = None if load is None else resolve(load)
    is_first = group_from_environment(os.environ).is_first
    experiment = load_experiment(config, set_ or [], print if is_first else _quiet)
    options = {
        "training.device": visible_device(device),
        "data.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        **({"scheduler.max_learning_rate": learning_rate} if experiment.scheduler.name == "onecycle" else {}),
    }
    changes = [f"{key}={value}" for key, value in options.items() if value is not None]
    experiment = from_dict(Experiment, override(to_dict(experiment), changes), name="options")
    if profile is not None:
        if minutes is not None:
            raise ConfigError("--profile and --minutes exclude each other: a profile ends after its steps")
        from onevoice.training.profile import profile_training

        profile_training(experiment, profile, load=resume or weights)
        return
    folder = run(experiment, resume=resume, load=weights, minutes=minutes)
    if is_first:
        print(describe_result(folder))


def visible_device(device: str | None) -> str | None:
    """Return the torch device of an option; the number of a GPU, as in the original system, hides all other GPUs.

    Raises `ConfigError` for several numbers.
    """
    if device is None or not device.replace(",", "").isdecimal():
        return device
    if "," in device:
        raise ConfigError(f"--device {device}: one process has one GPU; for several, use torchrun --nproc-per-node N")
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    return "cuda"


def _quiet(line: str) -> None:
    """Leave a line to the first process of the group."""


def average(output: Path, *checkpoints: Path) -> None:
    """Write the mean of the weights of CHECKPOINTS to OUTPUT: onevoice average OUT A B ….

    The mean of a run's last checkpoints often scores better than each of them.

    Args:
        output: The checkpoint to write (.safetensors).
        checkpoints: Two or more checkpoints of one run, such as its epoch-NNNN.safetensors.
    """
    from onevoice.extraction.checkpoint import save_checkpoint
    from onevoice.files import require_writable
    from onevoice.training.optim import average_checkpoints

    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: must end in .safetensors; the checkpoint to write comes first")
    require_writable(output)
    save_checkpoint(output, *average_checkpoints(checkpoints))
    print(output)


def schema(kind: str = "train") -> None:
    """Print the JSON Schema of the `train` or `eval` config: every key with its description and default.

    Args:
        kind: train or eval.
    """
    from onevoice.config import json_schema
    from onevoice.evaluation.run import EvaluationConfig
    from onevoice.training.experiment import Experiment

    kinds: dict[str, type[Any]] = {"train": Experiment, "eval": EvaluationConfig}
    if kind not in kinds:
        raise ConfigError(f"{kind}: unknown config; choose one of {', '.join(kinds)}")
    print(json.dumps(json_schema(kinds[kind]), indent=2))
