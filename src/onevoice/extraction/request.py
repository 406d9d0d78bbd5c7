"""What is to be extracted from one file into another, and a look at both before long work."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onevoice.errors import AudioError, ConfigError
from onevoice.extraction.enrollment import Spec, as_places, check_voice
from onevoice.extraction.presence import TIMELINES
from onevoice.extraction.voice import Voice
from onevoice.streams import PIPE, Source, check_outputs, is_here, open_source

Channel = int | Literal["mean", "each"]
"""A channel counted from 1, their average, or each one by itself."""


@dataclass(frozen=True)
class Request:
    """One extraction from file to file."""

    mixture: str | Path
    """The recording of several people; `-` is standard input."""
    voice: Voice | Spec | Sequence[Spec]
    """From `Extractor.enroll`, or names of recordings (`enrollment`)."""
    output: str | Path
    """The file to write; `-` is standard output."""
    residual: str | Path | None = None
    """The file for mixture − estimate."""
    channel: Channel = "mean"
    force: bool = False
    """Replace files that exist."""
    absent_db: float = 0.0
    """How far the output is turned down where the voice is not heard; infinity mutes."""
    timeline: str | Path | None = None
    """The file for the stretches in which the voice is heard: .csv, .rttm, or .txt for Audacity."""
    page: str | Path | None = None
    """The HTML page about the extraction."""
    shown_name: str | None = None
    """What the page calls the mixture; it then names no other file either."""

    def check(self) -> None:
        """Look at inputs and outputs before long work, as far as they are here. Raises what `extract_file` does."""
        if not isinstance(self.voice, Voice):
            check_voice(self.voice)
        self.check_names()
        if is_here(self.mixture):
            with open_source(self.mixture) as source:
                self.require_channel(source)

    def check_names(self) -> None:
        """Check, without opening a file, that the names go together and that the outputs can be written."""
        enrollments = [] if isinstance(self.voice, Voice) else [place.path for place in as_places(self.voice)]
        if (str(self.mixture) == PIPE and PIPE in enrollments) or enrollments.count(PIPE) > 1:
            raise ConfigError("-: standard input cannot be both the mixture and the voice; name a file for one")
        if str(self.output) == PIPE and self.residual is not None and str(self.residual) == PIPE:
            raise ConfigError("-: standard output cannot be both the output and the residual; name a file for one")
        _require_extension(self.timeline, "timeline", TIMELINES)
        _require_extension(self.page, "report", (".html", ".htm"))
        outputs, inputs = [self.output, self.residual], [self.mixture, *enrollments]
        check_outputs(outputs, inputs, self.force, [self.timeline, self.page])

    def require_channel(self, source: Source) -> None:
        """Raise an `AudioError` if the mixture does not have the channel."""
        if isinstance(self.channel, int) and not 1 <= self.channel <= source.channels:
            raise AudioError(f"{source.name}: has no channel {self.channel}, only 1 to {source.channels}")


def parse_absent(text: str) -> float:
    """Return how far `--absent` turns the output down, in dB: keep, mute, or a number. Raises `ConfigError`."""
    named = {"keep": 0.0, "mute": math.inf}
    try:
        level = named[text] if text in named else float(text)
    except ValueError:
        level = math.nan
    if not level >= 0:
        raise ConfigError(f"absent: {text!r} is none of keep, mute and a number of dB; give 30 to turn down by 30 dB")
    return level


def parse_channel(text: str) -> Channel:
    """Return the channel that an option names. Raises `ConfigError`."""
    if text == "mean":
        return "mean"
    if text == "each":
        return "each"
    if not text.isdecimal():
        raise ConfigError(f"channel: {text!r} is not a channel; give 1, 2, …, mean or each")
    return int(text)


def _require_extension(path: str | Path | None, option: str, extensions: Collection[str]) -> None:
    if path is not None and Path(path).suffix.lower() not in extensions:
        raise ConfigError(f"--{option}: {path} must end in {', '.join(extensions)}")
