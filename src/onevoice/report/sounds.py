"""Audio as a page shows it: a file to play, a waveform and a spectrogram, all inline."""

import base64
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, UInt8

from onevoice.audio import Mono, encode_audio

WINDOW_SECONDS = 0.032
MAX_COLUMNS, ROWS = 600, 128
"""Size of a spectrogram in pixels; short audio has fewer columns."""
DENSE_FRAMES = 16
"""Frames per column from which a smaller overlap shows the same."""
RANGE_DB = 70.0
"""Levels from 0 dB, the loudest cell of the group, down to minus this many dB have a color of their own."""
WAVEFORM_COLUMNS = 300
ANCHORS = ((10, 7, 30), (66, 24, 110), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 180))
"""The colors from silence to the loudest, evenly spaced; lightness rises all the way."""
COLORS = 48
MEDIA_TYPES = {".flac": "audio/flac", ".mp3": "audio/mpeg"}


def audio_uri(samples: Mono, sample_rate: int, suffix: str = ".flac") -> str:
    """Return audio as a data URI: FLAC is lossless, MP3 is small, and both play in every browser."""
    return _uri(MEDIA_TYPES[suffix], encode_audio(samples, sample_rate, suffix))


def waveform_path(samples: Mono, peak: float) -> str:
    """Return an SVG path of the envelope in a box of `WAVEFORM_COLUMNS` by 100; `peak` reaches its edges."""
    columns = min(WAVEFORM_COLUMNS, len(samples))
    starts = np.arange(columns) * len(samples) // columns
    scale = 50 / max(peak, 1e-9)
    high, low = (50 - scale * edge.reduceat(samples, starts) for edge in (np.maximum, np.minimum))
    x = (np.arange(columns) + 0.5) * (WAVEFORM_COLUMNS / columns)
    outline = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in outline) + "Z"


def power_db(samples: Mono, sample_rate: int) -> Float[np.ndarray, "rows columns"]:
    """Return the spectrogram in dB: `ROWS` bands up to half the sample rate, from high to low, over time.

    The mean power of all frames in a column is shown, so that no sound between two columns is lost.
    """
    return power_db_of([samples], len(samples), sample_rate)


def power_db_of(blocks: Iterable[Mono], samples: int, sample_rate: int) -> Float[np.ndarray, "rows columns"]:
    """Return what `power_db` returns for the whole of the blocks, of `samples` samples, column by column."""
    size = max(2 * ROWS, 32 * round(sample_rate * WINDOW_SECONDS / 32))  # a length without large prime factors
    hop = size // 4
    if samples > DENSE_FRAMES * MAX_COLUMNS * hop:
        hop = size // 2  # Hann windows that overlap by half still weight all samples alike
    padded = itertools.chain([np.zeros(size // 2, np.float32)], blocks, [np.zeros(size // 2 + hop, np.float32)])
    count = 1 + (samples + hop) // hop
    columns = min(MAX_COLUMNS, count)
    edges = np.arange(columns + 1) * count // columns
    bands = np.arange(ROWS) * (size // 2) // ROWS
    window = np.hanning(size).astype(np.float32)
    power = np.empty((ROWS, columns), np.float32)
    bounds = ((start * hop, (stop - 1) * hop + size) for start, stop in itertools.pairwise(edges.tolist()))
    for column, piece in enumerate(_cut(padded, bounds)):
        frames = np.lib.stride_tricks.sliding_window_view(piece, size)[::hop]
        spectrum = np.abs(np.fft.rfft(frames * window)) ** 2
        power[:, column] = np.add.reduceat(spectrum.mean(0)[: size // 2], bands)
    return np.asarray(10 * np.log10(power[::-1] + 1e-12))


def envelope_of(blocks: Iterable[Mono], samples: int, columns: int) -> Float[np.ndarray, "2 _columns"]:
    """Return the lowest and the highest sample of each column; fewer samples than columns are columns themselves."""
    edges = np.arange(min(columns, samples) + 1) * samples // max(1, min(columns, samples))
    pieces = _cut(iter(blocks), itertools.pairwise(edges.tolist()))
    return np.array([(piece.min(), piece.max()) for piece in pieces], np.float32).reshape(-1, 2).T


def _cut(blocks: Iterator[Mono], bounds: Iterable[tuple[int, int]]) -> Iterator[Mono]:
    """Yield the samples between each pair of bounds; pairs may overlap, but must not go back."""
    held, at = np.zeros(0, np.float32), 0
    for first, last in bounds:
        pieces, end = [held[first - at :]], at + len(held)
        while end < last and (block := next(blocks, None)) is not None:
            pieces.append(block[max(0, first - end) :].astype(np.float32))
            end += len(block)
        held, at = np.concatenate(pieces), first
        yield held[: last - first]


def spectrogram_uri(levels_db: Float[np.ndarray, "rows columns"], loudest_db: float) -> str:
    """Return a spectrogram as the data URI of a PNG image; `loudest_db` has the brightest color."""
    return _uri("image/png", _png(_shades(levels_db, loudest_db), _palette()))


def spectrogram_rgb(levels_db: Float[np.ndarray, "rows columns"], loudest_db: float) -> UInt8[np.ndarray, "r c 3"]:
    """Return a spectrogram as pixels in red, green and blue."""
    return np.asarray(_palette()[_shades(levels_db, loudest_db)])


def _shades(levels_db: Float[np.ndarray, "rows columns"], loudest_db: float) -> UInt8[np.ndarray, "rows columns"]:
    shades = np.clip(1 + (levels_db - loudest_db) / RANGE_DB, 0, 1)
    return np.rint(shades * (COLORS - 1)).astype(np.uint8)


def _palette() -> UInt8[np.ndarray, "colors rgb"]:
    places = np.linspace(0, len(ANCHORS) - 1, COLORS)
    channels = [np.interp(places, np.arange(len(ANCHORS)), channel) for channel in zip(*ANCHORS, strict=True)]
    return np.stack(channels, 1).astype(np.uint8)


def _png(pixels: UInt8[np.ndarray, "rows columns"], palette: UInt8[np.ndarray, "colors rgb"]) -> bytes:
    """Encode an image of palette indices (PNG specification, W3C 2003, color type 3)."""
    rows, columns = pixels.shape
    scanlines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each begins with filter type 0, none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(scanlines, 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
