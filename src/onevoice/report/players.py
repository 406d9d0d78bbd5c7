"""Players of a page: audio that is compared at the same position, with waveforms and spectrograms."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from onevoice.audio import Mono
from onevoice.report.page import render
from onevoice.report.sounds import WAVEFORM_COLUMNS, audio_uri, power_db, spectrogram_uri, waveform_path


class Track(NamedTuple):
    """One sound of a group of players."""

    name: str
    samples: Mono
    sample_rate: int
    is_aligned: bool = True
    """Whether it shares its time with the other aligned tracks; an enrollment does not."""


HOW_TO_LISTEN = "Choose a sound with the mouse or the arrow keys: it goes on at the same position."
"""A note for groups of players."""


def players(title: str, tracks: Sequence[Track], *, note: str = "", suffix: str = ".flac") -> Markup:
    """Return a group of players: one plays at a time, and switching keeps the position.

    All tracks share one scale: the loudest sample sets that of the waveforms, the loudest cell that of the
    spectrograms. A group louder than full scale is turned down as a whole; samples that are not finite become 0.
    `suffix` is .flac or, for long sounds, .mp3.
    """
    finite = [np.nan_to_num(track.samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0) for track in tracks]
    peak = max((float(np.abs(samples).max(initial=0.0)) for samples in finite), default=0.0)
    levels = [power_db(samples, track.sample_rate) for samples, track in zip(finite, tracks, strict=True)]
    loudest = max((float(each.max()) for each in levels), default=0.0)
    rows = [
        {
            "name": track.name,
            "aligned": track.is_aligned,
            "seconds": len(samples) / track.sample_rate,
            "khz": track.sample_rate / 2000,
            "audio": audio_uri(samples / max(1.0, peak), track.sample_rate, suffix),
            "waveform": waveform_path(samples, peak),
            "spectrogram": spectrogram_uri(level, loudest),
        }
        for track, samples, level in zip(tracks, finite, levels, strict=True)
    ]
    return render("players", title=title, tracks=rows, note=note, width=WAVEFORM_COLUMNS)
