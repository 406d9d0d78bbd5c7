"""What a resumed run must share with the run it resumes: every field of the config, one by one."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from onevoice.config import from_dict, to_dict
from onevoice.errors import CheckpointError
from onevoice.training.experiment import Experiment, changed_settings
from onevoice.training.state import read_resume_file

FREE_FIELDS = [
    "name", "runs_folder", "tracking", "data.validation", "data.validation_batch_size", "data.workers",
    "data.train.folder", "data.train.root", "data.train.librispeech_dir", "data.train.max_missing",
    "data.train.metadata", "data.train.wham_dir", "data.train.lists", "data.train.replace",
    "data.train.enrollment.file", "data.train.pack", "data.train.on_device", "data.train.noise.pack",
    "data.train.reverb.pack", "scheduler.decay_steps", "scheduler.decay_from_step", "scheduler.decay_shape",
    "scheduler.decay_divisor", "training.epochs", "training.compile", "training.device",
    "training.save_every_steps", "training.keep_every_epochs", "training.log_every_steps",
    "training.early_stop_epochs", "training.max_nonfinite_steps", "training.checkpoint_activations",
    "training.on_out_of_memory",
]  # fmt: skip
"""Fields that may change. All others must stay, also those that are added later."""

FOLDER = {"folder": "a"}
DYNAMIC = {
    "kind": "dynamic", "pack": "p", "noise": {"pack": "n"}, "reverb": {"pack": "r"}, "channel": {},
}  # fmt: skip
LIBRIMIX = {"kind": "librimix", "root": "r", "part": "dev", "enrollment": {"kind": "map", "file": "f"}}
METADATA = {"kind": "librimix_metadata", "metadata": "m", "librispeech_dir": "l"}
WSJ0 = {"kind": "wsj0_2mix", "lists": "l"}
DATA = {"folder": FOLDER, "dynamic": DYNAMIC, "librimix": LIBRIMIX, "metadata": METADATA, "wsj0": WSJ0}
SCHEDULERS = ("onecycle", "plateau", "constant", "wsd")


def build(data: str = "folder", scheduler: str = "constant") -> Experiment:
    values: dict[str, Any] = {
        "name": "toy",
        "data": {"train": DATA[data], "validation": FOLDER, "batch_size": 8},
        "scheduler": {"name": scheduler, **({"decay_steps": 5, "decay_from_step": 3} if scheduler == "wsd" else {})},
    }
    return from_dict(Experiment, values)


EXPERIMENTS = {
    **{data: build(data) for data in DATA},
    **{scheduler: build(scheduler=scheduler) for scheduler in SCHEDULERS if scheduler != "constant"},
}


def changes(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the section with each of its fields, and of the sections in it, changed: (dotted name, changed section)."""
    hints = get_type_hints(type(section))
    for field in fields(section):
        value, name = getattr(section, field.name), f"{path}.{field.name}".removeprefix(".")
        if is_dataclass(value):
            yield from ((inner, replace(section, **{field.name: changed})) for inner, changed in changes(value, name))
        options = [
            replaced for other in others(value, hints[field.name]) if (replaced := valid(section, field.name, other))
        ]
        if options:
            yield name, options[0]
        elif not is_dataclass(value) and not is_constant(hints[field.name]):
            pytest.fail(f"no other value found for {name}")


def is_constant(hint: Any) -> bool:
    return get_origin(hint) is Literal and len(get_args(hint)) == 1


def valid(section: Any, name: str, value: Any) -> Any:
    """The section with another value, or None if the value is not allowed."""
    changed = {**to_dict(section), name: to_dict(value) if is_dataclass(value) else value}
    try:
        return from_dict(type(section), json.loads(json.dumps(changed)))
    except Exception:
        return None


def others(value: Any, hint: Any) -> list[Any]:
    """Other values that a field could have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple | list):
        return [[*value[:at], other, *value[at + 1 :]] for at in range(len(value)) for other in others(value[at], Any)]
    if isinstance(value, dict):
        return [{**value, "other": "other"}]
    words = [word for option in (hint, *get_args(hint)) if get_origin(option) is Literal for word in get_args(option)]
    numbers = [value * 2, value / 2, value + 2, value - 1, 0] if isinstance(value, int | float) else []
    whole = [int(number) for number in numbers if number == int(number)]
    guesses = [*words, *whole, *map(float, numbers), "other", 2, 0.5, None, [0.5]]
    return [guess for guess in guesses if guess != value]


def all_changes() -> list[Any]:
    found = {
        (changed_name, label): (experiment, changed)
        for label, experiment in EXPERIMENTS.items()
        for changed_name, changed in changes(experiment)
    }
    seen: dict[str, Any] = {}
    for (name, label), pair in found.items():
        kind = label if name.startswith(("data.train", "scheduler", "training.epochs")) else ""
        seen.setdefault(f"{kind}:{name}", pytest.param(name, *pair, id=f"{kind}:{name}"))
    return list(seen.values())


CHANGES = all_changes()


def write(path: Path, experiment: Experiment) -> Path:
    """Write a resume file that holds nothing but what is compared."""
    content = {"experiment": json.dumps(to_dict(experiment)), "speakers": [], "data": "", "progress": {}}
    torch.save(content, path.with_suffix(".resume.pt"))
    path.touch()
    return path


@pytest.mark.parametrize(("name", "saved", "now"), CHANGES)
def test_every_field_must_stay_unless_it_is_free(name: str, saved: Experiment, now: Experiment, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "last.safetensors", saved)
    shapes_the_cycle = name == "training.epochs" and saved.scheduler.name == "onecycle"
    is_free = any(f"{name}.".startswith(f"{free}.") for free in FREE_FIELDS) and not shapes_the_cycle
    if is_free:
        read_resume_file(checkpoint, now, [], "")
        return
    with pytest.raises(CheckpointError) as caught:
        read_resume_file(checkpoint, now, [], "")
    assert f"was made with other settings ({name}); resume with its own config" in str(caught.value)


def test_the_changes_reach_every_kind_of_section() -> None:
    names = {change.values[0] for change in CHANGES}
    assert set(FREE_FIELDS) <= {part for name in names for part in prefixes(name)}
    assert {"model.filters", "loss.alpha", "optimizer.betas", "data.train.mixing.snr_db", "data.batch_size"} <= names
    assert len(names) > 90


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


@pytest.mark.parametrize(
    ("saved", "now", "names"),
    [
        (build(), build("dynamic"), ["data.train"]),
        (build(), build(scheduler="plateau"), ["scheduler"]),
        (build("dynamic"), from_dict(Experiment, {**to_dict(build("dynamic")), "seed": 3}), ["seed"]),
    ],
)
def test_sections_of_another_kind_are_named(saved: Experiment, now: Experiment, names: list[str]) -> None:
    assert changed_settings(saved, now) == names
    assert changed_settings(saved, saved) == []


def test_a_stage_that_is_switched_off_is_named() -> None:
    saved = build("dynamic")
    values = to_dict(saved)
    values["data"]["train"]["noise"] = None
    assert changed_settings(saved, from_dict(Experiment, values)) == ["data.train.noise"]


def test_several_changes_are_all_named() -> None:
    saved = build()
    now = replace(saved, seed=9, training=replace(saved.training, ema=0.9, epochs=3))
    assert changed_settings(saved, now) == ["seed", "training.ema"]
