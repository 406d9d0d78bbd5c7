"""Make the sample recordings of `onevoice demo` with two flite voices: python3 scripts/make_samples.py [FOLDER].

Flite (github.com/festvox/flite, `apt install flite`) returns the same samples at each run of the same version.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onevoice.audio import Mono, read_audio, write_audio
from onevoice.evaluation.demo import SAMPLES
from onevoice.mixing.law import ENROLLMENT_LUFS, mix_at_snr, pad_to_longest, shared_gain
from onevoice.mixing.levels import loudness_gain, trim_silence

TARGET, INTERFERER = "slt", "rms"
"""The voices of a woman and a man."""

TARGET_TEXT = (
    "The ferry leaves the island at seven in the morning, and the first passengers are always the bakers, "
    "who carry warm bread to the market."
)
INTERFERER_TEXT = (
    "My brother keeps four old radios in the kitchen, and each is tuned to another station, "
    "so breakfast is never quiet."
)
ENROLLMENT_TEXT = (
    "Please turn left at the stone bridge, follow the river for a mile, and ask for the house with the green door."
)

SNR_DB = 0.0


def say(voice: str, text: str) -> tuple[Mono, int]:
    """Return the speech that flite makes, without the silence around it, and its rate in Hz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        samples, rate = read_audio(path)
    return trim_silence(samples, 40.0), rate


def make_samples(folder: Path) -> None:
    """Write mixture.flac, target.flac and enrollment.flac."""
    target, rate = say(TARGET, TARGET_TEXT)
    interferer, interferer_rate = say(INTERFERER, INTERFERER_TEXT)
    assert rate == interferer_rate
    target, interferer = pad_to_longest(target, interferer)
    mixture, _ = mix_at_snr(target, interferer, SNR_DB)
    gain = np.float32(shared_gain(mixture, target, rate)[0])
    enrollment, _ = say(TARGET, ENROLLMENT_TEXT)
    enrollment = enrollment * np.float32(loudness_gain(enrollment, rate, ENROLLMENT_LUFS))
    for name, sound in (("mixture", mixture * gain), ("target", target * gain), ("enrollment", enrollment)):
        write_audio(folder / f"{name}.flac", sound, rate)
        print(f"{folder / f'{name}.flac'}: {len(sound) / rate:.1f} s at {rate} Hz")


if __name__ == "__main__":
    make_samples(Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES)
