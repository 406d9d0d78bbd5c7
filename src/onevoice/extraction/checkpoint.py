"""Checkpoints: weights that carry their own description, found by name, by path or on the Hugging Face hub.

A checkpoint is one `.safetensors` file. Its header holds a card: format number, model name and config, sample rate, the
training speakers in the order of the classifier, and facts (package version, git commit, data, step, validation score).
Reading it never runs code from the file. Pickled dicts with `state_dict` (`.pth`) can be read too, restricted to
tensors and plain containers; those of the original system are converted (`original.py`). Writing is atomic. What only
resuming needs is in a second file, `<name>.resume.pt`, complete in itself, so that a crash between the two writes never
mixes two moments of training. The header also holds the SHA-256 of all the rest, which loading compares; files of other
programs and of earlier versions have none, and load without it.

Weights are named by a spec:

    NAME                                   weights published with onevoice, in `weights/NAME.safetensors`
    PATH                                   a checkpoint file
    hf://OWNER/REPO[@REVISION][/FILE]      a file on the Hugging Face hub, kept in its cache

`weights/registry.json` lists the published names and the default. A published name never changes its bytes: every use
compares them with the SHA-256 in the registry. `scripts/publish.py` adds weights; docs/models/README.md explains how.
"""

import difflib
import hashlib
import importlib
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as section
from safetensors.torch import load as unpack_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from onevoice.config import STRICT, from_dict, load_config, to_dict
from onevoice.errors import CheckpointError, ConfigError, MissingDependencyError
from onevoice.extraction.original import OriginalCheckpoint, convert_checkpoint
from onevoice.extraction.pickled import load_pickled, unreadable_error
from onevoice.files import atomic_write, join_tensors, split_tensors
from onevoice.models import MODELS, ModelConfig, Network, build

FORMAT = 1
CARD_KEY = "onevoice"
State = dict[str, Tensor]

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the published weights and their registry."""

REGISTRY = "registry.json"
EXTENSIONS = (".safetensors", ".pth")
"""A spec with one of these endings is a path, whether or not the file exists."""

HUB = "hf://"
HUB_FILE = "model.safetensors"
_HUB_SPEC = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+\.safetensors))?")


# One checkpoint: what it holds, and how it is written and read


@dataclass(frozen=True)
class Card:
    """The description in the header of a checkpoint."""

    config: ModelConfig
    speakers: tuple[str, ...] = ()
    """The training speakers, in the order of the classifier."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How the weights were made: step, epoch, score, data, version, commit. Any JSON values."""

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
    """Write weights and card to `path`, atomically. Raises `StorageError`."""
    save_tensors(path, state, {CARD_KEY: card.to_json()})


def load_checkpoint(path: str | Path) -> tuple[State, Card]:
    """Read the weights and the card of a `.safetensors` checkpoint. Raises `CheckpointError`."""
    path = _existing(path)
    state, metadata = load_tensors(path)
    if CARD_KEY not in metadata:
        raise CheckpointError(f"{path}: has no onevoice card, so another program wrote it; give a onevoice checkpoint")
    return state, _parse_card(metadata[CARD_KEY], path)


def read_card(path: str | Path) -> Card:
    """Read the card of a `.safetensors` checkpoint. Raises `CheckpointError`."""
    return load_checkpoint(path)[1]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, metadata and their checksum to a `.safetensors` file, atomically. Raises `StorageError`."""
    plain = pack_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    header, content = split_tensors(plain)
    atomic_write(path, join_tensors({**header, "__metadata__": dict(metadata)}, content))


def load_tensors(path: str | Path) -> tuple[State, dict[str, str]]:
    """Read the tensors and the metadata of a `.safetensors` file, and compare its checksum if it has one.

    Raises `CheckpointError`.
    """
    try:
        data = Path(path).read_bytes()
        return unpack_tensors(data), split_tensors(data)[0].get("__metadata__") or {}
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise unreadable_error(Path(path), str(error)) from error


def load_weights(path: str | Path) -> tuple[State, Card | None]:
    """Read the weights of a checkpoint and its card. A `.pth` file has one only if the original system wrote it."""
    path = _existing(path)
    if path.suffix == ".safetensors":
        return load_checkpoint(path)
    state, original = _load_pth(path)
    return (state, None) if original is None else (original.state, Card(original.config, (), original.facts))


def load_original(path: str | Path) -> OriginalCheckpoint:
    """Read a checkpoint of the original system with what resuming needs. Raises `CheckpointError`."""
    _, original = _load_pth(_existing(path))
    if original is None:
        raise CheckpointError(f"{path}: not a checkpoint of the original system; take its weights alone with --load")
    return original


def _load_pth(path: Path) -> tuple[State, OriginalCheckpoint | None]:
    """Return the weights of a pickled dict under the names in the file, and its conversion if it is an original."""
    content = load_pickled(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: has no 'state_dict' of tensors; give a .safetensors checkpoint")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        return state, convert_checkpoint(content, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; copy it again") from error


def load_model(
    path: str | Path, config: ModelConfig | None = None, device: str | torch.device = "cpu"
) -> tuple[Network, Card]:
    """Build the network of a checkpoint with its weights, in evaluation mode, on `device`.

    `config` is only for files that do not say which model they are (`.pth`). 16-bit weights become 32-bit.
    """
    state, card = load_weights(path)
    if card is None:
        if config is None:
            raise CheckpointError(
                f"{path}: does not say which model it is, and is no SpexPlus of the original system (it holds "
                f"{next(iter(state), 'nothing')}, …); describe the model in a config (--config)"
            )
        card = Card(config)
    model = build(card.config)
    load_state(model, state, path)
    return model.to(device).eval(), card


def load_state(model: Network, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`, all of it or nothing. Raises `CheckpointError` naming what does not fit."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unknown to the model" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        some = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(f"{path}: belongs to another model than {model.config.name} of this config: {some}")
    model.load_state_dict(state)


def provenance() -> dict[str, str]:
    """Return the package version, torch's version and, in a git checkout, the commit."""
    facts = {"onevoice": version("onevoice"), "torch": torch.__version__}
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            facts["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["commit"] = "unknown"
    return facts


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        default = read_registry().default
        instead = f"give your own or {default}, the weights that come with onevoice" if default else "give your own"
        raise CheckpointError(f"{path}: no such checkpoint file; {instead} (onevoice info lists all)")
    return path


def _parse_card(text: str, path: Path) -> Card:
    try:
        card = json.loads(text)
        number, name, config = card["format"], card["model"], card["config"]
        speakers, facts = tuple(card["speakers"]), dict(card["facts"])
        is_newer, is_known = number > FORMAT, name in MODELS
        config = {"has_level": bool(facts.get("levelled")), **config}  # older cards have this fact, not the field
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its card is damaged ({error}); copy it again") from error
    if is_newer:
        raise CheckpointError(f"{path}: has format {number}, newer than this onevoice knows ({FORMAT}); upgrade it")
    if not is_known:
        raise CheckpointError(f"{path}: holds a {name!r}; this onevoice knows {', '.join(MODELS)}; upgrade it")
    try:
        return Card(from_dict(MODELS[name].config_class, config), speakers, facts)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its card does not fit this onevoice ({error}); upgrade onevoice") from error


# Where checkpoints come from: published with the package, on disk, on the hub


@section(frozen=True, config=STRICT)
class Published:
    """The entry of one published name in the registry."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the file."""
    bytes: int
    """Size of the file."""
    parameters: int
    """Number of weights."""
    sample_rate: int
    """The rate in Hz at which the network works."""
    si_sdr_improvement_db: float
    """Mean SI-SDRi on the trials that the model card names."""

    def line(self, name: str) -> str:
        """Return the line for a list of weights."""
        return (
            f"{name}  {self.parameters / 1e6:.1f} M parameters, {self.bytes / 1e6:.1f} MB, {self.sample_rate} Hz, "
            f"SI-SDRi {self.si_sdr_improvement_db:.2f} dB"
        )


@section(frozen=True, config=STRICT)
class Registry:
    """All published weights by name."""

    default: str | None = None
    """The name used when none is given."""
    weights: dict[str, Published] = Field(default_factory=dict)


def read_registry() -> Registry:
    """Return the registry of this installation."""
    return load_config(Registry, WEIGHTS / REGISTRY)


def resolve(spec: str | Path | None = None) -> Path:
    """Return the file that `spec` names: None names the default weights, and a `Path` is returned unchanged.

    A published name wins over a file of the same name. A path need not exist; the loader checks that. Raises
    `CheckpointError` for an unknown name, damaged weights or any problem on the hub, and `MissingDependencyError` for a
    hub spec without huggingface_hub.
    """
    if isinstance(spec, Path):
        return spec
    if spec is not None and spec.startswith(HUB):
        return _from_hub(spec)
    registry = read_registry()
    name = registry.default if spec is None else spec
    if name is None:
        raise CheckpointError("no weights come with this installation; name a checkpoint with --pretrained PATH")
    if name in registry.weights:
        return _published_file(name, registry.weights[name])
    path = Path(name)
    if path.suffix in EXTENSIONS or path.name != name or path.is_file():
        return path
    near = difflib.get_close_matches(name, registry.weights, 1)
    hint = f"did you mean {near[0]}?" if near else f"published names: {', '.join(registry.weights) or 'none'}"
    raise CheckpointError(f"{name}: neither a checkpoint file nor the name of published weights; {hint}")


def _published_file(name: str, published: Published) -> Path:
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing from this installation; install onevoice again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != published.sha256:
        raise CheckpointError(
            f"{path}: damaged (SHA-256 {found[:12]}…, published as {published.sha256[:12]}…); install onevoice again"
        )
    return path


def _from_hub(spec: str) -> Path:
    parts = _HUB_SPEC.fullmatch(spec)
    if parts is None:
        raise CheckpointError(f"{spec}: write it as hf://OWNER/REPO[@REVISION][/FILE.safetensors]")
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise MissingDependencyError(f'{spec}: needs huggingface_hub: pip install "onevoice[hub]"') from error
    try:
        return _download(hub, errors, parts["repo"], parts["revision"], parts["file"])
    except errors.GatedRepoError as error:
        reason = "you must accept its terms first; do so on the hub's page, then log in (hf auth login)"
        raise CheckpointError(f"{spec}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such repository on the hub, or a private one; check the name, or log in (hf auth login)"
        raise CheckpointError(f"{spec}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{spec}: the repository has no revision {parts['revision']}; check it") from error
    except (OSError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:150]
        raise CheckpointError(
            f"{spec}: cannot be downloaded from the hub and is not in its cache ({cause}); "
            "weights that come with onevoice need no network (onevoice info lists them)"
        ) from error


def _download(hub: Any, errors: Any, repo: str, revision: str | None, file: str | None) -> Path:
    """Return `file` in the hub's cache; by default `model.safetensors`, or the only .safetensors file."""
    try:
        return Path(hub.hf_hub_download(repo, file or HUB_FILE, revision=revision))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError as error:
        found = [each for each in hub.list_repo_files(repo, revision=revision) if each.endswith(".safetensors")]
        if file is None and len(found) == 1:
            return Path(hub.hf_hub_download(repo, found[0], revision=revision))
        wanted = f"no {file}" if file else f"no {HUB_FILE} and not exactly one other .safetensors file"
        has = ", ".join(found) or "none"
        raise CheckpointError(f"{HUB}{repo}: has {wanted}; name one of its files: {has}") from error
