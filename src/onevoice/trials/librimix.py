"""Renders LibriMix on request: mixtures of LibriSpeech and WHAM noise from the official metadata, without disk space.

The rules are those of the official generator (Cosentino et al., arXiv 2005.11262; github.com/JorisCos/LibriMix,
`create_librimix_from_metadata.py`). With the utterances x_k at 16 kHz and the gains g_k of the metadata,

    y_k = resample_poly(g_k x_k)     by scipy; at 16 kHz y_k = g_k x_k
    y_k cut to the shortest of them (`min`), or padded with zeros to the longest (`max`)
    mix_clean = y_1 + … + y_n        mix_both = y_1 + … + y_n + v        mix_single = y_1 + v

all in float32, summed from left to right, and every file rounded to 16 bits as libsndfile does
(`audio.pcm16_round_trip`). The noise v is the first channel of its file, cut to the length of the longest x_k and then
treated like the y_k. If the file is too short, it is first extended by copies of itself (`extend_noise`) and is float64
from then on. The rendered audio equals the official files bit for bit. At 8 kHz this holds for files made with scipy
1.8 or later, because earlier versions resampled float32 audio in float64, which changes some last bits.
"""

import csv
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Float32

from onevoice.audio import Mono, pcm16_round_trip, read_audio
from onevoice.errors import CorpusError, MissingDependencyError
from onevoice.trials.config import Mode, Rate

SOURCE_RATE = 16_000
"""Rate in Hz of LibriSpeech and of the WHAM noise."""
FADE_SAMPLES = SOURCE_RATE // 2 + 1
"""Length of the crossfade of extended noise: half of a Hanning window of one second, including its peak."""

Sources = tuple[Float32[np.ndarray, "_samples"], ...]


@dataclass(frozen=True)
class Scaled:
    """A file of the corpus and the gain that multiplies its samples."""

    file: Path
    gain: float


@dataclass(frozen=True)
class MetadataRow:
    """One mixture of the metadata. `noise` is None if no folder of noise was given."""

    mixture_id: str
    sources: tuple[Scaled, ...]
    noise: Scaled | None = None


@dataclass(frozen=True)
class LibriMixFile:
    """The file `<name>/<mixture_ID>.wav` of a generated LibriMix, rendered from its row.

    `name` is s1, s2, …, noise, mix_clean, mix_both or mix_single.
    """

    row: MetadataRow
    sample_rate: Rate
    mode: Mode
    name: str

    def render(self) -> tuple[Mono, int]:
        """Return the samples that the official file holds, and its rate in Hz.

        Raises `AudioError` or `CorpusError` for files that are missing, damaged or not at 16 kHz.
        """
        return pcm16_round_trip(_in_float(self)), self.sample_rate

    def files(self) -> tuple[Path, ...]:
        """Return the files that are read to render it."""
        noise = [self.row.noise.file] if self.row.noise and _is_noisy(self.name) else []
        return (*(source.file for source in self.row.sources), *noise)

    def __str__(self) -> str:
        return f"{self.name}/{self.row.mixture_id}"


def read_metadata(path: str | Path, librispeech_dir: Path, wham_dir: Path | None = None) -> list[MetadataRow]:
    """Read an official metadata CSV: mixture_ID, source_1_path, source_1_gain, …, noise_path, noise_gain.

    Its paths are relative to the two folders. Raises `CorpusError` for a file that is not such metadata.
    """
    path = Path(path)
    fields, rows = read_csv(path)
    numbers = [k for k in range(1, len(fields)) if f"source_{k}_path" in fields]
    missing = {"mixture_ID", "source_1_path", "source_2_path", *(f"source_{k}_gain" for k in numbers)} - set(fields)
    if wham_dir is not None:
        missing |= {"noise_path", "noise_gain"} - set(fields)
    if missing:
        raise CorpusError(f"{path}: columns are missing: {', '.join(sorted(missing))}; name a metadata CSV of LibriMix")
    return [
        MetadataRow(
            row["mixture_ID"],
            tuple(_scaled(path, line, row, f"source_{k}", librispeech_dir) for k in numbers),
            None if wham_dir is None else _scaled(path, line, row, "noise", wham_dir),
        )
        for line, row in enumerate(rows, start=2)
    ]


def read_csv(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """Return the columns and rows of a CSV; `CorpusError` for an unreadable file, or a missing or duplicate ID."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, restval="")
            rows, fields = list(reader), reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if "mixture_ID" not in fields:
        raise CorpusError(f"{path}: columns are missing: mixture_ID; name a metadata CSV of LibriMix")
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        name = row["mixture_ID"]
        if not name or set(name) & set("/\\\0"):
            raise CorpusError(f"{path}:{line}: {name!r} cannot be a mixture_ID; correct the row")
        if name in seen:
            raise CorpusError(f"{path}:{line}: mixture {name!r} appears twice; remove one row")
        seen.add(name)
    return fields, rows


def extend_noise(noise: Float[np.ndarray, " samples"], length: int) -> Float[np.ndarray, " length"]:
    """Extend `noise` to `length` samples at 16 kHz by appending it to itself, with a crossfade at each seam.

    In the crossfade, the last 8,001 samples so far, times the falling half of a Hanning window, overlap the first 8,001
    of the noise, times the rising half. Noise that is long enough is cut and stays float32; other noise becomes
    float64. Raises `CorpusError` for noise that is not longer than the crossfade.
    """
    if len(noise) < length and len(noise) <= FADE_SAMPLES:
        raise CorpusError(f"noise of {len(noise)} samples is too short to extend; give more than {FADE_SAMPLES}")
    rising = np.hanning(2 * FADE_SAMPLES - 1)[:FADE_SAMPLES]
    result = noise
    while len(result) < length:
        seam = result[-FADE_SAMPLES:] * rising[::-1] + noise[:FADE_SAMPLES] * rising
        result = np.concatenate([result[:-FADE_SAMPLES], seam, noise[FADE_SAMPLES:]])
    return result[:length]


def require_resampler(sample_rate: int) -> None:
    """Raise `MissingDependencyError` if this rate needs scipy and scipy is not installed."""
    if sample_rate != SOURCE_RATE:
        _resample_poly()


def _in_float(wanted: LibriMixFile) -> Float[np.ndarray, " samples"]:
    """Return the samples of a file before they are rounded to 16 bits."""
    sources, longest = _sources(wanted.row, wanted.sample_rate, wanted.mode)
    if wanted.name == "noise":
        return _noise(wanted, longest, len(sources[0]))
    if not wanted.name.startswith("mix_"):
        return sources[int(wanted.name.removeprefix("s")) - 1]
    # the official script starts from zeros and adds one source after the other, which decides the last bits
    mixture = np.zeros_like(sources[0])
    for source in sources[:1] if wanted.name == "mix_single" else sources:
        mixture += source
    if _is_noisy(wanted.name):
        mixture += _noise(wanted, longest, len(mixture))
    return mixture


@functools.lru_cache(maxsize=4)  # a mixture and its target are rendered one after the other
def _sources(row: MetadataRow, sample_rate: int, mode: Mode) -> tuple[Sources, int]:
    """Return the y_k, all of the same length, and the length of the longest x_k in samples at 16 kHz."""
    loaded = [_at_source_rate(source.file, *read_audio(source.file)) for source in row.sources]
    scaled = [samples * np.float32(source.gain) for samples, source in zip(loaded, row.sources, strict=True)]
    resampled = [_resampled(samples, sample_rate) for samples in scaled]
    length = (min if mode == "min" else max)(len(samples) for samples in resampled)
    fitted = tuple(np.pad(samples[:length], (0, max(length - len(samples), 0))) for samples in resampled)
    return fitted, max(len(samples) for samples in loaded)


def _noise(wanted: LibriMixFile, longest: int, length: int) -> Float[np.ndarray, " length"]:
    """Return the noise of a mixture whose longest x_k has `longest` samples at 16 kHz, cut to `length` samples."""
    noise = wanted.row.noise
    if noise is None:
        raise CorpusError(f"{wanted}: the mixture has noise, but no noise was given; name the folder of the WHAM noise")
    samples = _at_source_rate(noise.file, *read_audio(noise.file, channel=0, max_samples=longest))
    try:
        extended = extend_noise(samples, longest)
    except CorpusError as error:
        raise CorpusError(f"{noise.file}: {error}") from error
    gain = extended.dtype.type(noise.gain)
    return _resampled(extended * gain, wanted.sample_rate)[:length]


def _resampled(samples: Float[np.ndarray, " samples"], sample_rate: int) -> Float[np.ndarray, " resampled"]:
    if sample_rate == SOURCE_RATE:
        return samples
    return np.asarray(_resample_poly()(samples, sample_rate, SOURCE_RATE))


def _resample_poly() -> Callable[..., Any]:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise MissingDependencyError(
            'LibriMix at 8000 Hz needs scipy: pip install "onevoice[protocols]", or use 16000 Hz'
        ) from error
    return cast(Callable[..., Any], resample_poly)


def _is_noisy(name: str) -> bool:
    return name in ("noise", "mix_both", "mix_single")


def _at_source_rate(file: Path, samples: Mono, rate: int) -> Mono:
    if rate != SOURCE_RATE:
        raise CorpusError(f"{file}: is at {rate} Hz; LibriMix needs files at {SOURCE_RATE} Hz")
    return samples


def _scaled(path: Path, line: int, row: Mapping[str, str], name: str, root: Path) -> Scaled:
    file, text = row[f"{name}_path"], row[f"{name}_gain"]
    try:
        gain = float(text)
    except ValueError:
        gain = math.nan
    if not file or not math.isfinite(gain):
        raise CorpusError(f"{path}:{line}: {name} has the path {file!r} and the gain {text!r}; correct the row")
    return Scaled(root / file, gain)
