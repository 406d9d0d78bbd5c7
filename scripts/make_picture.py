"""Draw the spectrograms of the README: python3 scripts/make_picture.py [FILE.png].

The picture shows the generated sample recordings of `onevoice demo`: the mixture, and the voice that the default
weights extract from it. It needs matplotlib, which comes with the extra `docs`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from onevoice import load
from onevoice.audio import Mono, read_audio
from onevoice.evaluation.demo import SAMPLES

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
BEGIN, END = 4.0, 8.0
"""The stretch to show, in seconds; in its last 0.7 s only the other person speaks."""
WINDOW, HOP = 512, 64
HIGHEST_HZ = 4000
LOWEST_DB, HIGHEST_DB = -60.0, -15.0
"""The range of the colors; 0 dB is the loudest cell of the mixture."""


def spectrogram_db(samples: Mono) -> np.ndarray:
    """Return the power of each frequency (rows) and frame (columns) in dB."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * np.hanning(WINDOW)
    return np.asarray(20 * np.log10(np.abs(np.fft.rfft(frames)).T + 1e-9))


def draw(axes: Any, title: str, levels: np.ndarray, sample_rate: int) -> Any:
    """Draw one spectrogram and return the image."""
    from matplotlib.ticker import MultipleLocator

    image = axes.imshow(
        levels, origin="lower", aspect="auto", cmap="inferno", vmin=LOWEST_DB, vmax=HIGHEST_DB,
        extent=(BEGIN, END, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylim(0, HIGHEST_HZ / 1000)
    axes.set_xlabel("time (s)")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.yaxis.set_major_locator(MultipleLocator(1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return image


def make_picture(path: Path) -> None:
    """Extract the voice from the samples and draw both spectrograms side by side."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mixture, rate = read_audio(SAMPLES / "mixture.flac")
    voice = load().extract(mixture, rate, *read_audio(SAMPLES / "enrollment.flac"))
    shown = slice(round(BEGIN * rate), round(END * rate))
    before, after = spectrogram_db(mixture[shown]), spectrogram_db(np.asarray(voice)[shown])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    draw(left, "Mixture: two people speak at once", before - before.max(), rate)
    image = draw(right, "Extracted: the enrolled voice", after - before.max(), rate)
    left.set_ylabel("frequency (kHz)")
    figure.colorbar(image, ax=(left, right), label="level (dB)", aspect=25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    with Image.open(path) as picture:  # a palette makes the file several times smaller
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    make_picture(picture)
    print(picture)
