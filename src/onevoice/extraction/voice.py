"""A voice: the speaker embedding of one person by one network, and a check-up of the recordings that it comes from.

One value serves any number of recordings. It is saved as a small `.safetensors` file, whose header names the network by
the hash of its weights, the sources, and the check-up. Other weights cannot use it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onevoice.audio import Mono
from onevoice.errors import CheckpointError
from onevoice.extraction.checkpoint import load_tensors, save_tensors

EXTENSION = ".voice"
"""Files with this extension are saved voices."""
FORMAT = 1
KEY = "onevoice_voice"

GOOD_SPEECH_SECONDS = 3.0
"""Less speech than this gets a warning."""
MAX_CLIPPED_SHARE = 0.001
"""A larger share of clipped samples gets a warning."""
MIN_SNR_DB = 5.0
"""A smaller ratio of speech to background gets a warning."""
MIN_PAUSE_SECONDS = 0.2
"""Pauses in total from which the background is measured."""
SILENCE_DB = -120.0


@dataclass(frozen=True)
class CheckUp:
    """What is known about the recordings of a voice."""

    seconds: float
    """Length of the recordings in total."""
    speech_seconds: float
    """Length of the speech in them."""
    level_db: float
    """Level of the speech, in dB relative to full scale (RMS)."""
    clipped_share: float
    """Share of the samples that lie on a flat top."""
    snr_db: float | None
    """Level of the speech above that of the pauses, in dB; None without pauses."""
    warnings: tuple[str, ...] = ()
    """What is likely to spoil an extraction, one line each."""
    people: int = 1
    """The number of people heard in one recording, if that was looked at."""

    def text(self) -> str:
        """Return the numbers in one line."""
        snr = "no pauses to estimate the noise from" if self.snr_db is None else f"SNR about {self.snr_db:.0f} dB"
        return (
            f"{self.speech_seconds:.1f} s of speech in {self.seconds:.1f} s, level {self.level_db:.0f} dBFS, "
            f"{100 * self.clipped_share:.1f} % clipped, {snr}"
        )


@dataclass(frozen=True)
class Voice:
    """The speaker embedding of one person."""

    embedding: Float[Tensor, "1 speaker_dim"]
    model_hash: str
    """Hash of the weights that made the embedding; other weights cannot use it."""
    sources: tuple[str, ...] = ()
    """Names of the recordings."""
    check_up: CheckUp | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Voice):
            return NotImplemented
        return self.model_hash == other.model_hash and torch.equal(self.embedding, other.embedding)

    def __hash__(self) -> int:
        return hash((self.model_hash, tuple(self.embedding[0].tolist())))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is likely to spoil an extraction, one line each."""
        return () if self.check_up is None else self.check_up.warnings

    def describe(self) -> str:
        """Return a line with the check-up, and one for each warning."""
        about = "no check-up" if self.check_up is None else self.check_up.text()
        first = f"voice of {', '.join(self.sources) or 'a recording'}; {about}"
        return "\n".join([first, *(f"warning: {warning}" for warning in self.warnings)])

    def warn(self, *warnings: str) -> "Voice":
        """Return this voice with more warnings in its check-up."""
        if self.check_up is None or not warnings:
            return self
        return replace(self, check_up=replace(self.check_up, warnings=(*self.check_up.warnings, *warnings)))

    def count_people(self, people: int) -> "Voice":
        """Return this voice with the number of people in its check-up."""
        return self if self.check_up is None else replace(self, check_up=replace(self.check_up, people=people))

    def require_model(self, model_hash: str) -> None:
        """Raise `CheckpointError` if other weights made this voice."""
        if self.model_hash != model_hash:
            name = f"{', '.join(self.sources)}: " if self.sources else ""
            raise CheckpointError(
                f"{name}the voice was made by other weights ({self.model_hash[:12]}…) than these "
                f"({model_hash[:12]}…); enroll it again, or use its weights"
            )


def save_voice(voice: Voice, path: str | Path) -> None:
    """Write a voice to a file, atomically. Raises `StorageError`."""
    check_up = None if voice.check_up is None else asdict(voice.check_up)
    about = {"format": FORMAT, "model_hash": voice.model_hash, "sources": voice.sources, "check_up": check_up}
    save_tensors(Path(path), {"embedding": voice.embedding}, {KEY: json.dumps(about, sort_keys=True)})


def load_voice(path: str | Path, model_hash: str | None = None) -> Voice:
    """Read a saved voice. Raises `CheckpointError` if it is unreadable or, given a hash, comes from other weights."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such voice; make it with onevoice enroll RECORDING -o {path}")
    tensors, metadata = load_tensors(path)
    text = metadata.get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: is not a voice; make one with onevoice enroll RECORDING -o FILE{EXTENSION}")
    try:
        about = json.loads(text)
        if about["format"] > FORMAT:
            raise CheckpointError(f"{path}: has format {about['format']}, newer than {FORMAT}; upgrade onevoice")
        embedding, made_by = tensors["embedding"], str(about["model_hash"])
        if embedding.ndim != 2 or len(embedding) != 1 or not embedding.isfinite().all():
            raise ValueError("its embedding is not one row of finite numbers")
        voice = Voice(embedding.float(), made_by, tuple(map(str, about["sources"])), _parse(about["check_up"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); enroll the voice again") from error
    if model_hash is not None:
        replace(voice, sources=(str(path),)).require_model(model_hash)
    return voice


def _parse(check_up: dict[str, Any] | None) -> CheckUp | None:
    return None if check_up is None else CheckUp(**{**check_up, "warnings": tuple(check_up["warnings"])})


def trim(sound: Mono, speech: Bool[np.ndarray, "_samples"], min_samples: float) -> Mono:
    """Return a recording without its pauses; all of it if less than `min_samples` would be left."""
    return sound[speech] if int(speech.sum()) >= min_samples else sound


def examine(
    sounds: Sequence[Mono], masks: Sequence[Bool[np.ndarray, "_samples"]], sample_rate: int, clipped: float
) -> CheckUp:
    """Return the check-up of recordings; each mask is True where there is speech, `clipped` is the clipped share."""
    seconds = sum(map(len, sounds)) / sample_rate
    speech_seconds = sum(int(mask.sum()) for mask in masks) / sample_rate
    sound = np.concatenate([each - each.mean() for each in sounds]).astype(np.float64)
    speech = np.concatenate(list(masks))
    level = _level_db(sound[speech] if speech.any() else sound)
    snr = None
    if speech.any() and seconds - speech_seconds >= MIN_PAUSE_SECONDS:
        snr = float(10 * np.log10(max(10 ** ((level - _level_db(sound[~speech])) / 10) - 1, 1e-3)))
    warnings = []
    if not speech.any():
        warnings.append("no speech was found in the enrollment; give a recording of the person alone")
    elif speech_seconds < GOOD_SPEECH_SECONDS:
        warnings.append(f"the enrollment has only {speech_seconds:.1f} s of speech; 3 s or more are better")
    if clipped > MAX_CLIPPED_SHARE:
        warnings.append(f"{100 * clipped:.1f} % of the enrollment is clipped; record it at a lower level")
    if snr is not None and snr < MIN_SNR_DB:
        warnings.append(f"the enrollment is noisy (SNR about {snr:.0f} dB); record it in a quiet place")
    return CheckUp(seconds, speech_seconds, level, clipped, snr, tuple(warnings))


def _level_db(sound: Float[np.ndarray, "_samples"]) -> float:
    return max(SILENCE_DB, float(10 * np.log10(np.mean(np.square(sound)) + 1e-30)))


def clipped_share(sound: Mono) -> float:
    """Return the share of samples that lie on a flat top: at the highest or lowest value, beside another one there."""
    shares = 0.0
    for signed in (sound, -sound):
        top = signed >= signed.max() - 1e-3 * abs(float(signed.max()))
        beside = np.zeros_like(top)
        beside[1:] |= top[:-1]
        beside[:-1] |= top[1:]
        shares += float((top & beside).mean())
    return shares
