"""The mixing law once more, as a plain script: pyloudnorm for loudness, frames for silence, one file at a time.

The reference of `mixing/test_law.py` and the baseline of `benchmarks/mix_speed.py`. It uses only the draw and the
settings of the package.
"""

from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
import soxr

from onevoice.mixing.law import DrawnTrial, MixingLaw

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def plain_trial(draw: DrawnTrial, law: MixingLaw) -> list[Triple]:
    """Return (mixture, target, enrollment) of each segment; empty if the law draws again."""
    rate, meter = law.sample_rate, pyloudnorm.Meter(law.sample_rate)
    target, interferer, enrollment = (
        normalized(read(recording.path, rate), meter, level)
        for recording, level in ((draw.target, -29.0), (draw.interferer, -29.0), (draw.references[0], -23.0))
    )
    if law.trim_db is not None:
        target, interferer, enrollment = (trimmed(each, law.trim_db) for each in (target, interferer, enrollment))
    if len(enrollment) < rate:
        return []
    enrollment = enrollment * min(1.0, 0.99 / np.abs(enrollment).max())
    if law.full_length:
        length = max(len(target), len(interferer))
        pairs = [(np.pad(target, (0, length - len(target))), np.pad(interferer, (0, length - len(interferer))))]
    else:
        if law.vad_db is not None:
            target, interferer = without_silence(target, law.vad_db), without_silence(interferer, law.vad_db)
        length = round(law.segment_seconds * rate)
        count = min(len(target), len(interferer)) // length
        pairs = [
            (target[k * length : (k + 1) * length], interferer[k * length : (k + 1) * length]) for k in range(count)
        ]
    return [(*mixed(*pair, draw.snr_db, meter), enrollment) for pair in pairs]


def read(path: Path, rate: int) -> np.ndarray:
    samples, file_rate = soundfile.read(path, dtype="float32")
    samples = samples if samples.ndim == 1 else samples.mean(axis=1)
    if file_rate != rate:
        samples = soxr.resample(samples, file_rate, rate)
    return samples - samples.mean()


def normalized(samples: np.ndarray, meter: pyloudnorm.Meter, level: float) -> np.ndarray:
    return samples * 10 ** ((level - meter.integrated_loudness(samples)) / 20)


def mixed(target: np.ndarray, interferer: np.ndarray, snr_db: float, meter: pyloudnorm.Meter) -> tuple[np.ndarray, ...]:
    scale = np.sqrt(np.sum(target**2) / np.sum(interferer**2)) / 10 ** (snr_db / 20)
    mixture = target + scale * interferer
    gain = 10 ** ((-23.0 - meter.integrated_loudness(mixture)) / 20)
    gain = min(gain, 0.99 / max(np.abs(mixture).max(), np.abs(target).max()))
    return gain * mixture, gain * target


def is_sound(samples: np.ndarray, top_db: float) -> np.ndarray:
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 1024), 2048)[::512]
    powers = np.mean(np.square(frames), axis=1)
    return 10 * np.log10(np.maximum(powers, 1e-20) / powers.max()) > -top_db


def trimmed(samples: np.ndarray, top_db: float) -> np.ndarray:
    frames = np.nonzero(is_sound(samples, top_db))[0]
    return samples[frames[0] * 512 : (frames[-1] + 1) * 512]


def without_silence(samples: np.ndarray, top_db: float) -> np.ndarray:
    flags = is_sound(samples, top_db)
    return np.concatenate([samples[k * 512 : (k + 1) * 512] for k in np.nonzero(flags)[0]])
