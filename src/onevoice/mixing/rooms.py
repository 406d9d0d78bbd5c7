"""Simulated rooms: responses by the image-source method, for packs that training reverberates with.

Rooms are shoe boxes of random size and reverberation time with one microphone and several talkers at random places,
each at least half a metre from the walls and from the microphone. The simulation is pyroomacoustics' (Allen and
Berkley, "Image method for efficiently simulating small-room acoustics", JASA 1979; wall absorption by Sabine's
formula from the wanted reverberation time).
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
CLEARANCE = 0.5
"""Least distance in metres of a talker from walls and microphone."""


@dataclass(frozen=True, config=STRICT)
class RoomLaw:
    """What rooms are drawn from; lengths in metres, times in seconds."""

    sample_rate: PositiveInt = 16_000
    talkers: PositiveInt = 4
    length: PositiveRange = (3.0, 10.0)
    width: PositiveRange = (3.0, 8.0)
    height: PositiveRange = (2.4, 4.0)
    reverberation_seconds: PositiveRange = (0.15, 0.6)
    """T60: the time in which the sound decays by 60 dB."""


def simulate_room(law: RoomLaw, seed: int, index: int) -> list[Mono]:
    """Return one response per talker of room `index`, each with peak 0.9; a function of law, seed and index alone.

    Raises `MissingDependencyError` without pyroomacoustics.
    """
    try:
        import pyroomacoustics
    except ImportError as error:
        raise MissingDependencyError('simulating rooms needs pyroomacoustics: pip install "onevoice[rooms]"') from error
    rng = derive(seed, "room", index)
    for _ in range(MAX_DRAWS):
        size = np.array([rng.uniform(*law.length), rng.uniform(*law.width), rng.uniform(*law.height)])
        try:
            absorption, order = pyroomacoustics.inverse_sabine(rng.uniform(*law.reverberation_seconds), size)
        except ValueError:  # a room so large would need walls that absorb more than everything
            continue
        break
    else:
        raise ConfigError(
            "reverberation_seconds: too short for rooms of this size; ask for longer ones or smaller rooms"
        )
    room = pyroomacoustics.ShoeBox(
        size, fs=law.sample_rate, materials=pyroomacoustics.Material(absorption), max_order=order
    )
    microphone = _place(rng, size)
    room.add_microphone(microphone)
    for _ in range(law.talkers):
        room.add_source(_place(rng, size, microphone))
    room.compute_rir()
    return [(0.9 * response / np.abs(response).max()).astype(np.float32) for response in room.rir[0]]


def simulate_rooms(law: RoomLaw, out: Path, count: int, seed: int = 0, workers: int = 1) -> None:
    """Write the responses of `count` rooms as `out/roomNNNN/talkerNN.wav` (32-bit float)."""
    with_law = functools.partial(_writer, law, seed, out)
    for _ in ordered_map(with_law, range(count), workers):
        pass


def _writer(law: RoomLaw, seed: int, out: Path) -> "functools.partial[None]":
    return functools.partial(_write_room, law, seed, out)


def _write_room(law: RoomLaw, seed: int, out: Path, index: int) -> None:
    for number, response in enumerate(simulate_room(law, seed, index)):
        path = out / f"room{index:04d}" / f"talker{number:02d}.wav"
        write_audio(path, response, law.sample_rate, subtype="FLOAT", durable=False)


def _place(
    rng: np.random.Generator, size: Float[np.ndarray, "3"], away_from: Float[np.ndarray, "3"] | None = None
) -> Float[np.ndarray, "3"]:
    while True:
        place = rng.uniform(CLEARANCE, size - CLEARANCE)
        if away_from is None or np.linalg.norm(place - away_from) >= CLEARANCE:
            return place
