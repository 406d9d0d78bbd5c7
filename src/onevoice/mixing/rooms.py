"""Simulated rooms: room responses by the image-source method, to be packed for training with reverberation.

Rooms are shoe boxes of random size and reverberation time with one microphone and several talkers at random places,
each at least half a meter from the walls and from the microphone. pyroomacoustics simulates them (Allen and Berkley,
"Image method for efficiently simulating small-room acoustics", JASA 1979; wall absorption from the wanted
reverberation time by Sabine's formula).
"""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from onevoice.audio import Mono, write_audio
from onevoice.config import STRICT, PositiveRange
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.processes import ordered_map
from onevoice.rng import derive

MAX_DRAWS = 100
"""Rooms drawn before giving up on a reverberation time that their size does not allow."""
MIN_DISTANCE = 0.5
"""Smallest distance in meters of a talker from walls and microphone."""


@dataclass(frozen=True, config=STRICT)
class RoomConfig:
    """The ranges that rooms are drawn from."""

    sample_rate: PositiveInt = 16_000
    """Sample rate of the responses in Hz."""
    talkers: PositiveInt = 4
    """Number of talkers per room, each with one response."""
    length: PositiveRange = (3.0, 10.0)
    """Range of the length of a room in meters."""
    width: PositiveRange = (3.0, 8.0)
    """Range of the width of a room in meters."""
    height: PositiveRange = (2.4, 4.0)
    """Range of the height of a room in meters."""
    reverberation_seconds: PositiveRange = (0.15, 0.6)
    """Range of T60 in seconds, the time in which sound decays by 60 dB."""


def simulate_room(config: RoomConfig, seed: int, index: int) -> list[Mono]:
    """Return one response per talker of room `index`, each with peak 0.9; a function of config, seed and index alone.

    Raises `ConfigError` when the rooms are too large for the reverberation time, `MissingDependencyError` without
    pyroomacoustics.
    """
    try:
        import pyroomacoustics
    except ImportError as error:
        raise MissingDependencyError('simulating rooms needs pyroomacoustics: pip install "onevoice[rooms]"') from error
    rng = derive(seed, "room", index)
    for _ in range(MAX_DRAWS):
        size = np.array([rng.uniform(*config.length), rng.uniform(*config.width), rng.uniform(*config.height)])
        try:
            absorption, order = pyroomacoustics.inverse_sabine(rng.uniform(*config.reverberation_seconds), size)
        except ValueError:  # this room is so large that its walls would have to absorb more than everything
            continue
        break
    else:
        raise ConfigError("reverberation_seconds: too short for rooms of this size; give longer times or smaller rooms")
    room = pyroomacoustics.ShoeBox(
        size, fs=config.sample_rate, materials=pyroomacoustics.Material(absorption), max_order=order
    )
    microphone = _random_place(rng, size)
    room.add_microphone(microphone)
    for _ in range(config.talkers):
        room.add_source(_random_place(rng, size, microphone))
    room.compute_rir()
    return [(0.9 * response / np.abs(response).max()).astype(np.float32) for response in room.rir[0]]


def simulate_rooms(config: RoomConfig, out: Path, count: int, seed: int = 0, workers: int = 1) -> None:
    """Write the responses of `count` rooms as `out/roomNNNN/talkerNN.wav` (32-bit float)."""
    start = functools.partial(_start, config, seed, out)
    for _ in ordered_map(start, range(count), workers):
        pass


def _start(config: RoomConfig, seed: int, out: Path) -> "functools.partial[None]":
    return functools.partial(_write_room, config, seed, out)


def _write_room(config: RoomConfig, seed: int, out: Path, index: int) -> None:
    for number, response in enumerate(simulate_room(config, seed, index)):
        path = out / f"room{index:04d}" / f"talker{number:02d}.wav"
        write_audio(path, response, config.sample_rate, subtype="FLOAT", durable=False)


def _random_place(
    rng: np.random.Generator, size: Float[np.ndarray, "3"], away_from: Float[np.ndarray, "3"] | None = None
) -> Float[np.ndarray, "3"]:
    while True:
        place = rng.uniform(MIN_DISTANCE, size - MIN_DISTANCE)
        if away_from is None or np.linalg.norm(place - away_from) >= MIN_DISTANCE:
            return place
