"""The demo: an extraction from the sample recordings in the package (`samples/README.md` describes them)."""

import time
from dataclasses import dataclass
from pathlib import Path

from onevoice.audio import read_audio, write_audio
from onevoice.evaluation.metrics import si_sdr, si_sdr_improvement
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.recording import extract_file

SAMPLES = Path(__file__).parents[1] / "extraction" / "samples"
"""`mixture.flac`; `enrollment.flac`, the wanted voice; `target.flac`, what that voice says in the mixture."""
OUTPUTS = ("mixture.wav", "enrollment.wav", "voice.wav", "residual.wav")
"""The files that the demo writes."""


@dataclass(frozen=True)
class Demo:
    """The result of the demo."""

    folder: Path
    """The folder with `OUTPUTS`."""
    si_sdr_db: float
    """SI-SDR of the extracted voice."""
    si_sdr_improvement_db: float
    """Its improvement over the mixture, SI-SDRi."""
    real_time_factor: float
    """Seconds of computing, reading and writing per second of mixture."""

    def text(self) -> str:
        """Return the lines that `onevoice demo` prints."""
        return (
            f"mixture  {self.folder / 'mixture.wav'}\n"
            f"voice    {self.folder / 'voice.wav'} (what is left: {self.folder / 'residual.wav'})\n"
            f"SI-SDR   {self.si_sdr_db:.2f} dB, {self.si_sdr_improvement_db:+.2f} dB over the mixture (SI-SDRi)\n"
            f"speed    {self.real_time_factor:.2f} s per second of sound"
        )


def run(extractor: Extractor, folder: Path) -> Demo:
    """Extract the enrolled voice of the samples into `folder` and measure it; replaces what is there.

    Raises `StorageError`.
    """
    for name in ("mixture", "enrollment"):
        write_audio(folder / f"{name}.wav", *read_audio(SAMPLES / f"{name}.flac"))
    voice = folder / "voice.wav"
    begin = time.perf_counter()
    extract_file(extractor, *(folder / name for name in OUTPUTS), force=True)
    seconds = time.perf_counter() - begin
    (estimate, rate), (mixture, _), (target, _) = map(
        read_audio, (voice, folder / "mixture.wav", SAMPLES / "target.flac")
    )
    return Demo(
        folder,
        si_sdr(estimate, target),
        si_sdr_improvement(estimate, mixture, target),
        seconds * rate / len(mixture),
    )
