"""Configs of the original system, https://github.com/ir4kgl/ss_dla, as configs of this package.

Such a config is a JSON object with `arch`, `data`, `optimizer`, `lr_scheduler`, `loss`, `metrics` and `trainer`, most
of them as `{"type": CLASS, "args": {…}}`. A class that has no counterpart here raises `ConfigError`; a key that has
none is left out and named in `Translation.left_out`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from onevoice.config import Json, from_dict, override, read_config
from onevoice.errors import ConfigError
from onevoice.extraction.original import ORIGINAL_MODEL, SAMPLE_RATE
from onevoice.training.experiment import Experiment

METRICS = {"SISPDRMetric": "si_sdr", "PESQMetric": "pesq"}
SEED, LOG_EVERY_STEPS = 123, 5
"""What the original system fixes in its code."""
PESQ_EXAMPLES = 10
"""Validation trials to measure PESQ on; the original measures all, every tenth epoch."""


@dataclass
class Translation:
    """A config of this package, and what it could not take over."""

    values: Json
    left_out: list[str] = field(default_factory=list)
    """The keys without a counterpart, each with the reason."""

    def describe(self) -> str:
        """Return one line that lists what was left out."""
        return f"without a counterpart: {'; '.join(self.left_out) or 'nothing'}"


class Reader:
    """Reads the keys of one section of an original config, and collects those that nobody asked for."""

    def __init__(self, values: Any, path: str, left_out: list[str]) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: must be an object, not {values!r}")
        self.values, self.path, self.left_out = dict(values), path, left_out

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; afterwards it counts as read."""
        return self.values.pop(key, default)

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}.{key}: must be a string, not {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        """Return a whole number above 0."""
        value = self.take(key, default)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.path}.{key}: must be a whole number above 0, not {value!r}")
        return value

    def section(self, key: str) -> "Reader":
        """Return the reader of a section, an empty one if the section is missing."""
        return Reader(self.take(key, {}), f"{self.path}.{key}".removeprefix("."), self.left_out)

    def arguments(self, key: str, *kinds: str) -> "tuple[str, Reader]":
        """Return the class that a section names, one of `kinds` (the default is the first), and its arguments."""
        section = self.section(key)
        kind = section.take("type", kinds[0])
        if kind not in kinds:
            raise ConfigError(f"{section.path}.type: {kind!r} has no counterpart; choose {' or '.join(kinds)}")
        arguments = section.section("args")
        section.finish()
        return kind, arguments

    def leave_out(self, key: str, reason: str) -> None:
        """Name a key that is there and has no counterpart."""
        if self.take(key) not in (None, [], {}):
            self.left_out.append(f"{self.path}.{key} ({reason})".removeprefix("."))

    def finish(self) -> None:
        """Name the keys that are left."""
        self.left_out += [f"{self.path}.{key}".removeprefix(".") for key in self.values]


def load_experiment(path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> Experiment:
    """Read an experiment from a JSON file; if it is a config of the original system, say what was left out of it."""
    values = read_config(path)
    if is_original(values):
        translation = translate_experiment(values)
        say(f"{path}: translated from the original system; {translation.describe()}")
        values = translation.values
    return from_dict(Experiment, override(values, overrides), name=str(path))


def is_original(values: Mapping[str, Any]) -> bool:
    """Check whether a JSON object has the shape of an original config."""
    data = values.get("data")
    splits = data.values() if isinstance(data, Mapping) else ()
    return isinstance(values.get("arch"), Mapping) or any(
        isinstance(split, Mapping) and "datasets" in split for split in splits
    )


def is_for_evaluation(values: Mapping[str, Any]) -> bool:
    """Check whether an original config names trials for evaluation only."""
    data = values.get("data")
    return isinstance(data, Mapping) and "test" in data and "train" not in data


def translate_experiment(values: Mapping[str, Any]) -> Translation:
    """Return the `Experiment` of an original config for training, as plain JSON values."""
    result = Translation({})
    top = Reader(values, "", result.left_out)
    trainer = top.section("trainer")
    result.values = {
        "name": top.take("name", "original"),
        "seed": SEED,
        "runs_folder": str(PurePosixPath(trainer.text("save_dir", "saved"))),
        "model": _model(top),
        "data": _data(top.section("data")),
        "loss": _loss(top),
        **_optimizer(top, trainer.values.get("epochs")),
        "training": _training(trainer, top.take("n_gpu", 1)),
        "tracking": _tracking(trainer, _metrics(top)),
    }
    _finish(top, trainer)
    return result


def translate_evaluation(values: Mapping[str, Any]) -> Translation:
    """Return the `EvaluationConfig` of an original config, as plain JSON values; trials are `test`, or else `val`."""
    result = Translation({})
    top = Reader(values, "", result.left_out)
    data = top.section("data")
    split = next((name for name in ("test", "val") if name in data.values), "test")
    trials = data.section(split)
    result.values = {"folder": _folder(trials), "batch_size": trials.take("batch_size", 1)}
    trials.leave_out("num_workers", "trials are read in the main process")
    trials.finish()
    if metrics := _metrics(top):
        result.values["metrics"] = metrics
    if "arch" in top.values:
        result.values["model"] = _model(top)
    if top.take("n_gpu", 1) == 0:
        result.values["device"] = "cpu"
    data.values.clear()  # the other splits, and all that only training needs, are of no use here
    for key in ("name", "preprocessing", "optimizer", "lr_scheduler", "loss", "trainer"):
        top.take(key)
    _finish(top)
    return result


def _finish(top: Reader, *sections: Reader) -> None:
    augmentations = top.section("augmentations")
    for kind in ("wave", "spectrogram"):
        augmentations.leave_out(kind, "use noise, reverb and channel of data.train of kind dynamic")
    for section in (augmentations, *sections, top):
        section.finish()


def _model(top: Reader) -> Json:
    preprocessing = top.section("preprocessing")
    rate = preprocessing.count("sr", SAMPLE_RATE)
    preprocessing.finish()
    _, args = top.arguments("arch", "SpexPlus")
    filters = args.count("embed_dim", 256)
    windows = [args.count("L1", 40), args.count("L2", 160), args.count("L3", 320)]
    for key, default, needed in (
        ("L", 40, windows[0]),
        ("hidden", 256, filters),
        ("speaker_encoder_hidden", 512, 2 * filters),
    ):
        if (given := args.take(key, default)) != needed:
            raise ConfigError(f"arch.args.{key}: must be {needed} to match the other sizes, not {given!r}")
    model = {
        "name": "spexplus",
        "sample_rate": rate,
        "window_seconds": [window / rate for window in windows],
        "filters": filters,
        "channels": filters,
        "hidden": 2 * filters,
        "kernel_size": 3,
        "blocks": args.take("B", 8),
        "stacks": args.take("R", 4),
        "speaker_dim": filters,
        "num_classes": args.take("num_classes", 0),
        **ORIGINAL_MODEL,
    }
    args.finish()
    return model


def _data(data: Reader) -> Json:
    train = data.section("train")
    validation = data.section(next((name for name in data.values if name != "train"), "val"))
    values = {
        "train": {"folder": _folder(train)},
        "validation": {"folder": _folder(validation)},
        "batch_size": train.take("batch_size", 1),
        "validation_batch_size": validation.take("batch_size", 1),
        "workers": train.take("num_workers", 1),
    }
    validation.take("num_workers")  # one number serves both
    for section in (train, validation, data):
        section.finish()
    return values


def _folder(split: Reader) -> str:
    """Return the folder of the first data set of a split; the others are left out."""
    datasets = split.take("datasets")
    if not (isinstance(datasets, list) and datasets):
        raise ConfigError(f"{split.path}.datasets: is missing; name a folder of trials there")
    for number in range(1, len(datasets)):
        split.left_out.append(f"{split.path}.datasets[{number}] (put all trials into one folder)")
    first = Reader({"datasets[0]": datasets[0]}, split.path, split.left_out)
    kind, args = first.arguments("datasets[0]", "MixedLibrispeechDataset", "MixedGeneralDataset")
    folder = PurePosixPath(args.text("data_dir", "."))
    args.leave_out("index_dir", "no index file is needed")
    if kind == "MixedLibrispeechDataset":
        folder /= args.text("part", "")
    args.finish()
    return str(folder)


def _loss(top: Reader) -> Json:
    _, args = top.arguments("loss", "MultiLoss")
    loss = {key: args.take(key, default) for key, default in (("alpha", 0.1), ("beta", 0.1), ("lambd", 0.5))}
    args.finish()
    return loss


def _optimizer(top: Reader, epochs: Any) -> Json:
    kind, args = top.arguments("optimizer", "Adam", "AdamW")
    optimizer = {"name": kind.lower(), "learning_rate": args.take("lr", 1e-3)}
    optimizer |= {key: args.take(key) for key in ("weight_decay", "betas") if key in args.values}
    if kind == "AdamW":
        optimizer.setdefault("weight_decay", 0.01)  # torch's default
    args.finish()
    if "lr_scheduler" not in top.values:
        return {"optimizer": optimizer, "scheduler": {"name": "constant"}}
    _, args = top.arguments("lr_scheduler", "OneCycleLR")
    scheduler = {"name": "onecycle", "max_learning_rate": args.take("max_lr", optimizer["learning_rate"])}
    names = {"pct_start": "rising_part", "div_factor": "start_divisor", "final_div_factor": "final_divisor"}
    scheduler |= {ours: args.take(theirs) for theirs, ours in names.items() if theirs in args.values}
    if args.values.get("anneal_strategy") == "cos":
        args.take("anneal_strategy")
    if args.values.get("epochs") == epochs:
        args.take("epochs")
    for key in ("epochs", "steps_per_epoch", "total_steps"):
        args.leave_out(key, "the schedule ends with the last epoch")
    args.finish()
    return {"optimizer": optimizer, "scheduler": scheduler}


def _training(trainer: Reader, gpus: Any) -> Json:
    patience = trainer.take("early_stop", 0)
    training = {
        "epochs": trainer.take("epochs", 1),
        "steps_per_epoch": trainer.take("len_epoch"),
        "clip_gradient_norm": trainer.take("grad_norm_clip"),
        "keep_every_epochs": trainer.take("save_period"),
        "early_stop_epochs": patience if isinstance(patience, int) and patience > 0 else None,
        "log_every_steps": LOG_EVERY_STEPS,
        "device": "cpu" if gpus == 0 else "auto",
    }
    if isinstance(gpus, int) and gpus > 1:
        trainer.left_out.append("n_gpu (start with torchrun --nproc-per-node N for several GPUs)")
    trainer.leave_out("monitor", "the best weights are those with the highest validation SI-SDRi")
    trainer.leave_out("verbosity", "there is one level")
    return training


def _metrics(top: Reader) -> list[str]:
    metrics = top.take("metrics", [])
    if not isinstance(metrics, list):
        raise ConfigError(f"metrics: must be a list, not {metrics!r}")
    named = [str(metric.get("type") if isinstance(metric, Mapping) else metric) for metric in metrics]
    if unknown := [name for name in named if name not in METRICS]:
        raise ConfigError(f"metrics: {unknown[0]!r} has no counterpart; choose {' or '.join(METRICS)}")
    return [METRICS[name] for name in named]


def _tracking(trainer: Reader, metrics: Sequence[str]) -> Json:
    place, project = trainer.take("visualize"), trainer.take("wandb_project")
    if place not in (None, "wandb", "tensorboard"):
        raise ConfigError(f"trainer.visualize: {place!r} has no counterpart; choose wandb or tensorboard")
    tracking: Json = {"tensorboard": place == "tensorboard", "pesq_examples": PESQ_EXAMPLES * ("pesq" in metrics)}
    if place == "wandb":
        tracking["wandb"] = {"project": project or "onevoice", "mode": "online"}
    return tracking
