"""The config sections of mixtures drawn at every step: voices, noise, rooms, and the channel of the enrollment."""

from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT, Fraction, Location, PositiveRange, require_rising

LevelDb = Annotated[float, Field(ge=-100, le=100)]
LevelRange = Annotated[tuple[LevelDb, LevelDb], AfterValidator(require_rising)]
"""Lowest and highest value in dB of a uniform draw."""
ExcerptSeconds = Annotated[float, Field(ge=0.1, le=60)]
InterfererCount = Annotated[int, Field(ge=1, le=2)]


@dataclass(frozen=True, config=STRICT)
class NoiseStep:
    """Add an excerpt of a noise recording; short recordings are repeated."""

    pack: Location
    """A folder of packed noise, written by `onevoice corpus pack --layout flat`."""
    probability: Fraction = 1.0
    """Probability that a mixture has noise."""
    snr_db: LevelRange = (0.0, 20.0)
    """Range of the level of all voices together above the noise, in dB by energy."""


@dataclass(frozen=True, config=STRICT)
class ReverbStep:
    """Put the voices of a mixture into one room, each at another place.

    A room is a speaker folder of the pack, a place one of its responses. The target of training is the direct sound
    with the reflections of the first `early_seconds`.
    """

    pack: Location
    """A folder of packed room responses, written by `onevoice corpus pack --keep-mean`."""
    probability: Fraction = 1.0
    """Probability that a mixture is in a room."""
    early_seconds: PositiveFloat = 0.05
    """Reflections up to this many seconds after the direct sound belong to the target."""
    enrollment_probability: Fraction = 0.0
    """Probability that the enrollment is in a room too; it is another room if the pack has several."""


@dataclass(frozen=True, config=STRICT)
class ChannelStep:
    """Give the enrollment another channel than the mixture: band limits, a spectral tilt, a telephone codec."""

    probability: Fraction = 0.5
    """Probability that an enrollment passes a channel."""
    low_cut_hz: PositiveRange = (20.0, 300.0)
    """Range of the lower band limit in Hz, where the level has dropped by 3 dB."""
    high_cut_hz: PositiveRange = (3000.0, 8000.0)
    """Range of the upper band limit in Hz, where the level has dropped by 3 dB."""
    tilt_db_per_octave: LevelRange = (-3.0, 3.0)
    """Range of the spectral tilt in dB per octave; positive makes high frequencies louder. It is 0 dB at 1 kHz."""
    codec_probability: Fraction = 0.0
    """Probability that a channel includes 8-bit mu-law coding (ITU-T G.711)."""


@dataclass(frozen=True, config=STRICT)
class MixingStep:
    """The voices of a mixture: how many, how long, at which levels."""

    segment_seconds: ExcerptSeconds = 4.0
    """Length of every mixture in seconds; a shorter utterance is placed at random in it, with silence around it."""
    enrollment_seconds: Annotated[tuple[ExcerptSeconds, ExcerptSeconds], AfterValidator(require_rising)] = (3.0, 10.0)
    """Range of the length of an enrollment in seconds; a shorter utterance is used whole."""
    min_utterance_seconds: NonNegativeFloat = 1.0
    """Shorter utterances are not used; the only utterance of a speaker is cut in half and needs twice this length."""
    interferers: Annotated[tuple[InterfererCount, InterfererCount], AfterValidator(require_rising)] = (1, 1)
    """Lowest and highest number of interferers, 1 or 2."""
    snr_db: LevelRange = (-5.0, 5.0)
    """Range of the level of the target above each interferer, in dB by energy over the segment."""
    mixture_dbfs: LevelRange = (-35.0, -20.0)
    """Range of the RMS level of the mixture in dBFS; the level is lower if a peak would exceed 0.9."""
    enrollment_dbfs: LevelRange = (-35.0, -20.0)
    """Range of the RMS level of the enrollment in dBFS; the level is lower if a peak would exceed 0.9."""
    absent: Fraction = 0.0
    """Share of trials with the enrollment of a speaker who is not in the mixture; their target is silence."""
    alone: Fraction = 0.0
    """Share of trials without interferers."""
    paired: bool = False
    """Trials 2k and 2k + 1 share a mixture: the target of one is the first interferer of the other. Then only the
    enrollment tells which voice to extract. Which trials are absent or alone, and channels, are drawn for each."""

    def __post_init__(self) -> None:
        """Check that the shares of both kinds of trial fit together."""
        if self.absent + self.alone > 1:
            raise ValueError(f"absent + alone is {self.absent + self.alone:g} and must not exceed 1")
