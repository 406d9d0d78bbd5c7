"""Checkpoints: weights that carry their own description.

A checkpoint is one `.safetensors` file. Its header holds a card: format number, model name and config, sample
rate, the training speakers in the order of the classifier, and facts (package version, git commit, data, step,
validation score). Reading it never runs code from the file; reading the original system's `.pth` files, a
pickled dict with `state_dict`, is restricted to tensors and plain containers. Writing is atomic.

What only resuming needs stands in a second file, `<name>.resume.pt`, written by `save_resume`; that file is
complete by itself, so that a crash between the two writes never mixes two moments of training.
"""

import io
import json
import pickle
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from onevoice.config import from_dict, to_dict
from onevoice.errors import CheckpointError, ConfigError
from onevoice.files import atomic_write
from onevoice.models import MODELS, ModelConfig, Network, build_model

FORMAT = 1
CARD_KEY = "onevoice"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself."""

    config: ModelConfig
    speakers: tuple[str, ...] = ()
    """The training speakers, in the order of the classifier."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Free facts about how the weights came to be: step, epoch, score, data, version, commit."""

    def to_json(self) -> str:
        """Return the card as the text of the header."""
        card = {
            "format": FORMAT,
            "model": self.config.name,
            "sample_rate": self.config.sample_rate,
            "config": to_dict(self.config),
            "speakers": list(self.speakers),
            "facts": dict(self.facts),
        }
        return json.dumps(card, ensure_ascii=False, sort_keys=True)


def save_checkpoint(path: Path, state: Mapping[str, Tensor], card: Card) -> None:
    """Write weights and card to `path`, whole or not at all. Raises `StorageError`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    atomic_write(path, save_tensors(tensors, metadata={CARD_KEY: card.to_json()}))


def load_checkpoint(path: str | Path) -> tuple[State, Card]:
    """Read the weights and the card of a `.safetensors` checkpoint; raises `CheckpointError`."""
    path = _existing(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_tensors(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); copy it again") from error
    if CARD_KEY not in metadata:
        raise CheckpointError(f"{path}: has no onevoice card; it belongs to another program")
    return state, _read_card(metadata[CARD_KEY], path)


def load_weights(path: str | Path) -> tuple[State, Card | None]:
    """Read weights from a checkpoint, or from a `.pth` file of the original form, which has no card."""
    path = _existing(path)
    if path.suffix == ".safetensors":
        return load_checkpoint(path)
    content = load_pickled(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: holds no 'state_dict' of tensors; give a .safetensors checkpoint")
    return {name.removeprefix("module."): value for name, value in state.items()}, None


def load_model(
    path: str | Path, config: ModelConfig | None = None, device: str | torch.device = "cpu"
) -> tuple[Network, Card]:
    """Build the network of a checkpoint with its weights, in evaluation mode, on `device`.

    `config` is needed for `.pth` files, which do not say what they are, and is ignored otherwise. Weights stored in
    16 bits become 32-bit ones.
    """
    state, card = load_weights(path)
    if card is None:
        if config is None:
            raise CheckpointError(f"{path}: does not say which model it is; name the model in a config (--c)")
        card = Card(config)
    with warnings.catch_warnings():  # published networks have a classifier of no speakers
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = build_model(card.config)
    load_state(model, state, path)
    return model.to(device).eval(), card


def load_state(model: Network, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Put `state` into `model`, every tensor of it; `CheckpointError` says what does not fit."""
    wanted = model.state_dict()
    problems = [f"lacks {name}" for name in wanted.keys() - state.keys()]
    problems += [f"has {name} too many" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if problems:
        some = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(f"{path}: belongs to another model than {model.config.name} of this config: {some}")
    model.load_state_dict(state)


def save_resume(path: Path, content: Mapping[str, Any]) -> None:
    """Write what resuming needs (tensors and plain values only), whole or not at all. Raises `StorageError`."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    atomic_write(path, buffer.getvalue())


def resume_path(checkpoint: str | Path) -> Path:
    """Return the file that holds the training state beside a checkpoint; itself when it is one already."""
    checkpoint = Path(checkpoint)
    return checkpoint if checkpoint.name.endswith(".resume.pt") else checkpoint.with_suffix(".resume.pt")


def load_pickled(path: str | Path) -> dict[str, Any]:
    """Read a dict written by `torch.save` without running any code of it; raises `CheckpointError`.

    Objects of foreign classes (the original system pickled its config parser) become inert placeholders.
    """
    path = _existing(path)
    try:
        foreign = [_placeholder(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path))]
        with torch.serialization.safe_globals(cast(Any, foreign)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: holds code beside tensors, and nothing of it was run; "
            "give a .safetensors file or a dict with 'state_dict'"
        ) from error
    except Exception as error:  # torch raises a dozen types for the many ways in which a file can be broken
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def provenance() -> dict[str, str]:
    """Return the package version and, when run from its git checkout, the commit."""
    facts = {"onevoice": version("onevoice"), "torch": torch.__version__}
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            facts["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["commit"] = "unknown"
    return facts


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    return path


def _read_card(text: str, path: Path) -> Card:
    try:
        card = json.loads(text)
        number, name, config = card["format"], card["model"], card["config"]
        speakers, facts = tuple(card["speakers"]), dict(card["facts"])
        is_newer, is_known, config = number > FORMAT, name in MODELS, dict(config)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its card is damaged ({error}); copy it again") from error
    if is_newer:
        raise CheckpointError(f"{path}: has format {number}, newer than this onevoice knows ({FORMAT}); upgrade it")
    if not is_known:
        raise CheckpointError(f"{path}: holds a {name!r}; this onevoice knows {', '.join(MODELS)}")
    try:
        return Card(from_dict(MODELS[name][0], config), speakers, facts)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its card does not fit this onevoice ({error})") from error


def _placeholder(name: str) -> tuple[type, str]:
    """Return an inert class to stand in for the global `name` of a pickle, and the name."""

    class Foreign:
        def __new__(cls, *args: Any, **kwargs: Any) -> "Foreign":
            return super().__new__(cls)

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __setstate__(self, state: Any) -> None: ...

    return Foreign, name


def average_checkpoints(paths: Sequence[str | Path]) -> tuple[State, Card]:
    """Return the mean of the weights of checkpoints of one model, each weighing the same, and a card that lists them.

    Sums are taken in float64. Counters are those of the first. Raises `CheckpointError` for unequal configs or
    training speakers.
    """
    if len(paths) < 2:
        raise CheckpointError(
            "an average needs two checkpoints or more: onevoice average OUT A.safetensors B.safetensors"
        )
    first, card = load_checkpoint(paths[0])
    sums = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    sources = [_source(paths[0], card)]
    for path in paths[1:]:
        state, other = load_checkpoint(path)
        if (other.config, other.speakers) != (card.config, card.speakers):
            what = "another config" if other.config != card.config else "other training speakers"
            raise CheckpointError(f"{path}: has {what} than {paths[0]}; average checkpoints of one run")
        for name, total in sums.items():
            total += state[name]
        sources.append(_source(path, other))
    means = {name: (total / len(paths)).to(first[name].dtype) for name, total in sums.items()}
    return {**first, **means}, Card(card.config, card.speakers, {"average_of": sources, **provenance()})


def _source(path: str | Path, card: Card) -> dict[str, Any]:
    return {"file": Path(path).name, "experiment": card.facts.get("experiment"), "step": card.facts.get("step")}
