"""A voice from files: recordings, stretches of recordings, voices found in a recording, or a saved voice.

    FILE            a recording of the person alone; several of them are joined
    FILE@1:20-1:31  a stretch of a recording, in seconds, minutes:seconds or hours:minutes:seconds
    FILE#2          the second person that `onevoice voices FILE` lists
    FILE.voice      a saved voice

A file that has exactly the given name is meant first.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onevoice.addresses import as_address, local_copy
from onevoice.audio import Mono, require_file, resample
from onevoice.errors import AudioError, ConfigError
from onevoice.extraction.arrays import mix_down
from onevoice.extraction.discovery import RATE, FoundVoice, embed_stretches, find_voices
from onevoice.extraction.extractor import Extractor, check_enrollment, load
from onevoice.extraction.vad import Stretch, as_mask, find_speech
from onevoice.extraction.voice import EXTENSION, Voice, load_voice
from onevoice.streams import is_here, open_source

SAME_PERSON = 0.4
"""A recording whose median similarity to the others is below this comes from another person.

Among four dev recordings of one person and one of another, this leaves out 2 % of the right ones and keeps 7 % of the
wrong ones.
"""
MAX_COMPARED_SECONDS = 20.0
"""Speech of each recording that is compared."""
MAX_SEARCHED_SECONDS = 180.0
"""The beginning of each recording that is searched for other voices."""
MIN_SECOND_VOICE_SECONDS = 2.0
"""Another voice that speaks for less is not reported."""

_STRETCH = re.compile(r"(?P<path>.+)@(?P<begin>[\d:.]+)-(?P<end>[\d:.]+)")
_NUMBER = re.compile(r"(?P<path>.+)#(?P<number>\d+)")


@dataclass(frozen=True)
class Place:
    """Where a voice can be heard."""

    name: str
    """What messages call it."""
    path: str
    stretch: tuple[float, float] | None = None
    """In seconds; None: all of it."""
    number: int | None = None
    """The number of a found voice; None: no search."""

    @property
    def is_saved(self) -> bool:
        """Check whether it is a saved voice."""
        return Path(self.path).suffix.lower() == EXTENSION


Spec = str | Path | Place
"""A file, a stretch, a number, or a saved voice, as above; or a place, with a name of the caller's choice."""


@dataclass(frozen=True)
class Sound:
    """Mono sound of one place."""

    name: str
    samples: Mono
    sample_rate: int
    speech: tuple[Stretch, ...] = ()
    """Where there is speech in it, once that was looked for."""


def parse_place(spec: Spec) -> Place:
    """Return the place that a spec names. Raises `ConfigError` for a stretch or number that makes no sense."""
    if isinstance(spec, Place):
        return spec
    text = str(spec)
    if not Path(text).exists():
        if match := _STRETCH.fullmatch(text):
            begin, end = _seconds(match["begin"], text), _seconds(match["end"], text)
            if not begin < end:
                raise ConfigError(f"{text}: ends before it begins; write FILE@BEGIN-END")
            return Place(text, match["path"], (begin, end))
        if match := _NUMBER.fullmatch(text):
            if int(match["number"]) < 1:
                raise ConfigError(f"{text}: voices are counted from 1")
            if as_address(match["path"]):
                raise ConfigError(
                    f"{text}: a numbered voice needs a file of this machine; name a stretch of it instead"
                )
            return Place(text, match["path"], number=int(match["number"]))
    return Place(text, text)


def _seconds(text: str, spec: str) -> float:
    """Return a time such as 80, 1:20 or 0:01:20.5 in seconds."""
    parts = text.split(":")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or any(value >= 60 for value in values[1:]):
        raise ConfigError(f"{spec}: {text!r} is no time; write seconds, 1:20, or 1:02:03.5")
    return sum(value * 60.0**power for power, value in enumerate(reversed(values)))


def as_places(voice: Spec | Sequence[Spec]) -> list[Place]:
    """Return the places of a voice. Raises `ConfigError`."""
    places = [parse_place(spec) for spec in ([voice] if isinstance(voice, str | Path | Place) else voice)]
    if not places:
        raise ConfigError("voice: is missing; name a recording or a saved voice")
    saved = [place.name for place in places if place.is_saved]
    if saved and len(places) > 1:
        raise ConfigError(f"{saved[0]}: is a saved voice, which cannot be joined with others; enroll all recordings")
    return places


def check_voice(voice: Spec | Sequence[Spec]) -> None:
    """Look at the files of a voice without decoding them. Raises `AudioError` and others."""
    for place in as_places(voice):
        if place.is_saved and is_here(place.path):
            load_voice(place.path)
        elif is_here(place.path):
            with open_source(place.path):
                pass


def enroll_files(extractor: Extractor, voice: Spec | Sequence[Spec]) -> Voice:
    """Return the voice of one or several places. The check-up of the voice has warnings.

    Of three or more recordings, those that do not sound like the others are left out, and a warning names them.
    Raises `AudioError`, `ConfigError`, and `CheckpointError` for the saved voice of other weights.
    """
    places = as_places(voice)
    if places[0].is_saved:
        with local_copy(places[0].path) as path:
            return load_voice(path, extractor.model_hash)
    sounds = [read_place(place) for place in places]
    for sound in sounds:
        check_enrollment(sound.samples, sound.sample_rate, sound.name)
    sounds = [_with_speech(sound, extractor.sample_rate) for sound in sounds]
    sounds, warnings = _without_outliers(sounds)
    return _warn_of_others(extractor, sounds).warn(*warnings)


def find_in_file(path: str | Path) -> list[FoundVoice]:
    """Return the people who speak in a recording (`find_voices`). Raises `AudioError`."""
    status = require_file(path).stat()
    return list(_find_in_version(str(path), status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _find_in_version(path: str, size: int, changed_ns: int) -> tuple[FoundVoice, ...]:
    """Search a recording once, as long as it does not change."""
    sound = read_place(Place(path, path))
    return tuple(find_voices(sound.samples, sound.sample_rate))


def format_time(seconds: float) -> str:
    """Return a time as `parse_place` takes it: 1:20.5."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def read_place(place: Place) -> Sound:
    """Read the sound of a place. Raises `AudioError`."""
    with open_source(place.path) as source:
        rate = source.sample_rate
        begin, end = (0.0, np.inf) if place.stretch is None else place.stretch
        first, pieces, at = round(begin * rate), [], 0
        for block in source.blocks():
            last = len(block) if np.isinf(end) else round(end * rate) - at
            pieces.append(block[max(0, first - at) : max(0, last)])
            at += len(block)
            if at >= end * rate:
                break
        if at < first or (place.stretch is not None and at < end * rate - rate):
            raise AudioError(f"{place.name}: ends after {at / rate:.1f} s; name a stretch before that")
        samples = mix_down(np.ascontiguousarray(np.concatenate(pieces).T))
    if place.number is not None:
        samples = _pick_voice(place, samples, rate)
    return Sound(place.name, samples, rate)


def _pick_voice(place: Place, samples: Mono, rate: int) -> Mono:
    """Return the sound of one found voice, where nobody else speaks if there is enough of that."""
    assert place.number is not None
    found = find_in_file(place.path)
    if place.number > len(found):
        there = (
            f"only persons 1 to {len(found)}" if len(found) > 1 else "only one person" if found else "nor anybody else"
        )
        raise AudioError(f"{place.name}: was not found, {there}")
    return found[place.number - 1].enrollment(samples, rate)


def _with_speech(sound: Sound, rate: int) -> Sound:
    """Find the speech in a sound, at the rate at which `Extractor.enroll` does so."""
    return replace(sound, speech=tuple(find_speech(resample(sound.samples, sound.sample_rate, rate), rate)))


def _without_outliers(sounds: list[Sound]) -> tuple[list[Sound], list[str]]:
    """Leave out recordings of another person than most; return the others, and warnings."""
    if len(sounds) < 2:
        return sounds, []
    embeddings = np.concatenate([embed_stretches([_speech(sound)]) for sound in sounds])
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, np.nan)
    typical = np.nanmedian(similarity, axis=1)
    if len(sounds) == 2:
        names = " and ".join(sound.name for sound in sounds)
        return sounds, [f"{names} sound like two people"] if typical[0] < SAME_PERSON else []
    fits = typical >= SAME_PERSON
    if 2 * fits.sum() <= len(sounds):
        return sounds, ["the recordings sound like several people; enroll those of one person"]
    kept = [sound for sound, is_kept in zip(sounds, fits, strict=True) if is_kept]
    gone = [sound.name for sound, is_kept in zip(sounds, fits, strict=True) if not is_kept]
    left = [f"{name} was left out, as it sounds like another person" for name in gone]
    return kept, left


def _speech(sound: Sound) -> Mono:
    """Return the first speech of a sound at the rate of the speaker encoders."""
    mask = as_mask(sound.speech, len(sound.samples), sound.sample_rate)
    speech = sound.samples[mask] if mask.any() else sound.samples
    return resample(speech[: round(MAX_COMPARED_SECONDS * sound.sample_rate)], sound.sample_rate, RATE)


def _warn_of_others(extractor: Extractor, sounds: list[Sound]) -> Voice:
    """Return the voice of recordings, with a warning if a recording has more than one."""
    samples, rates = [sound.samples for sound in sounds], [sound.sample_rate for sound in sounds]
    names, spoken = [sound.name for sound in sounds], [sound.speech for sound in sounds]
    voice = extractor.enroll(samples, rates, names, spoken)
    warnings, most = [], 1
    for sound in sounds:
        limit = MAX_SEARCHED_SECONDS
        searched = sound.samples[: round(limit * sound.sample_rate)]
        speech = [(begin, min(end, limit)) for begin, end in sound.speech if begin < limit]
        found = [each for each in find_voices(searched, sound.sample_rate, speech) if _is_long(each)]
        most = max(most, len(found))
        if len(found) > 1:
            warnings.append(
                f"{sound.name} seems to have {len(found)} voices; use a stretch of it, or another recording, in which "
                "only one is heard"
            )
    return voice.count_people(most).warn(*warnings)


def _is_long(voice: FoundVoice) -> bool:
    return voice.seconds >= MIN_SECOND_VOICE_SECONDS


@dataclass(frozen=True)
class Separated:
    """One person of a recording."""

    voice: FoundVoice
    """When the person speaks."""
    samples: Mono
    """The sound of the person alone, as long as the recording."""
    sample_rate: int
    """In Hz, that of the recording."""


def separate(recording: str | Path, extractor: Extractor | None = None) -> list[Separated]:
    """Find the people who speak in a recording (`find_voices`) and extract each, by the default weights if none given.

    Everything is in memory; `onevoice extract RECORDING --all FOLDER` writes files of any length. Raises `AudioError`.
    """
    extractor = load() if extractor is None else extractor
    mixture = read_place(Place(str(recording), str(recording)))
    separated = []
    for found in find_in_file(recording):
        voice = extractor.enroll(found.enrollment(mixture.samples, mixture.sample_rate), mixture.sample_rate)
        samples = extractor.extract(mixture.samples, mixture.sample_rate, voice)
        separated.append(Separated(found, samples, mixture.sample_rate))
    return separated
