"""Weights that come with the package, and how any weights are named.

A spec is one of

    NAME                                   weights published with onevoice, in `weights/NAME.safetensors`
    PATH                                   a checkpoint file
    hf://OWNER/REPO[@REVISION][/FILE]      a file on the Hugging Face hub, kept in its cache

and `resolve` turns it into a file. What is published, and which name is the default, stands in
`weights/registry.json`. A published name never changes its bytes: the SHA-256 in the registry is compared at each
use. `scripts/publish.py` adds weights; docs/models/README.md says how.
"""

import difflib
import hashlib
import importlib
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT, load_config
from onevoice.errors import CheckpointError, MissingDependencyError

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the published weights and their registry."""

REGISTRY = "registry.json"
CHECKPOINTS = (".safetensors", ".pth")
"""Endings by which a spec is a path, whether the file is there or not."""

HUB = "hf://"
HUB_FILE = "model.safetensors"
_HUB_SPEC = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+\.safetensors))?")


@dataclass(frozen=True, config=STRICT)
class Published:
    """What the registry says of one name."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the file."""
    bytes: int
    """Size of the file."""
    parameters: int
    """Number of weights."""
    sample_rate: int
    """The rate in Hz at which the network works."""
    si_sdr_improvement_db: float
    """Mean SI-SDRi on the trials that the model card names."""

    def line(self, name: str) -> str:
        """Return what a list says of these weights."""
        return (
            f"{name}  {self.parameters / 1e6:.1f} M parameters, {self.bytes / 1e6:.1f} MB, {self.sample_rate} Hz, "
            f"SI-SDRi {self.si_sdr_improvement_db:.2f} dB"
        )


@dataclass(frozen=True, config=STRICT)
class Registry:
    """All published weights by name, and the one that is used when none is named."""

    default: str | None = None
    weights: dict[str, Published] = field(default_factory=dict)


def read_registry() -> Registry:
    """Return what is published with this installation."""
    return load_config(Registry, WEIGHTS / REGISTRY)


def resolve(spec: str | Path | None = None) -> Path:
    """Return the file that `spec` names; None names the default weights, and a `Path` is taken as it is.

    A published name goes before a file of the same name. Whether a path exists is for the loader to say. Raises
    `CheckpointError` for an unknown name, damaged weights and all that can go wrong on the hub, and
    `MissingDependencyError` for a hub spec without huggingface_hub.
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
        return _packaged(name, registry.weights[name])
    path = Path(name)
    if path.suffix in CHECKPOINTS or path.name != name or path.is_file():
        return path
    near = difflib.get_close_matches(name, registry.weights, 1)
    known = ", ".join(registry.weights) or "none"
    raise CheckpointError(
        f"{name}: no such checkpoint file, nor the name of published weights (there are: {known})"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _packaged(name: str, published: Published) -> Path:
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
        reason = "asks for consent to its terms; give it on the hub's page, then log in (hf auth login)"
        raise CheckpointError(f"{spec}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such repository on the hub, or a private one; check the name, or log in (hf auth login)"
        raise CheckpointError(f"{spec}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{spec}: the repository has no revision {parts['revision']}") from error
    except (OSError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:150]
        raise CheckpointError(
            f"{spec}: cannot be fetched from the hub and is not in its cache ({cause}); "
            "weights that come with onevoice need no network (onevoice info lists them)"
        ) from error


def _download(hub: Any, errors: Any, repo: str, revision: str | None, file: str | None) -> Path:
    """Return the file in the hub's cache; without a name `model.safetensors`, or the only one of its kind."""
    try:
        return Path(hub.hf_hub_download(repo, file or HUB_FILE, revision=revision))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError as error:
        found = [each for each in hub.list_repo_files(repo, revision=revision) if each.endswith(".safetensors")]
        if file is None and len(found) == 1:
            return Path(hub.hf_hub_download(repo, found[0], revision=revision))
        wanted = file or f"{HUB_FILE}, nor one .safetensors file alone"
        has = ", ".join(found) or "none"
        raise CheckpointError(f"{HUB}{repo}: has no {wanted}; its .safetensors files: {has}") from error
