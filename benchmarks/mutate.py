"""Damage for files: bytes, text, JSON, safetensors and pickles, each changed at random from a generator with a seed."""

import io
import json
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from onevoice.corpus.pack import CHECKSUM
from onevoice.files import split_tensors

Mutator = Callable[[np.random.Generator, bytes], bytes]

BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0A, 0x20, 0x22, 0x2C, 0x7B)
NUMBERS = (0, 1, 2, 3, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)
WORDS = (
    "-1",
    "0",
    "1",
    "1e308",
    "-1e-300",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "nan",
    "Infinity",
    "",
    " ",
    "null",
    "x" * 9999,
)
SIGNS = (
    "\0",
    "\ufeff",
    "\u00a0",
    "\u2028",
    "\r",
    "\n",
    "\t",
    '"',
    "'",
    ",",
    ";",
    "{",
    "}",
    "[" * 100_000,
    "\\ud800",
    "\U0001f600",
)
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**30, 2**63, 2**31, 1e308, -1e-300, 0.5, math.nan, math.inf, "", "x", "\0",
    "\ud800", "x" * 9999, "../..", "/", "nan", "1", [], {}, [1], [[]], {"a": 1}, [None, "a"],
)  # fmt: skip


def mutate_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Change one to four places; half of them in the first 256 bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        _change_bytes(rng, changed)
    return bytes(changed)


def _change_bytes(rng: np.random.Generator, data: bytearray) -> None:
    end = len(data) if rng.random() < 0.5 else min(256, len(data))
    place = int(rng.integers(0, max(end, 1)))
    length = int(rng.integers(1, rng.choice([4, 64, 4096])))
    match int(rng.integers(0, 11)):
        case 0 | 1 if data:
            data[place] ^= 1 << int(rng.integers(0, 8))
        case 2 if data:
            data[place] = int(rng.choice(BYTES))
        case 3 if data:
            data[place] = int(rng.integers(0, 256))
        case 4 | 5:
            form = str(rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
            number = NUMBERS[int(rng.integers(0, len(NUMBERS)))] % 2 ** (8 * struct.calcsize(form))
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        case 6:
            del data[int(rng.integers(0, len(data) + 1)) :]
        case 7:
            del data[place : place + length]
        case 8:
            data[place:place] = data[place : place + length]
        case 9:
            data[place : place + length] = bytes(len(data[place : place + length]))
        case _:
            data[place:place] = rng.bytes(length)


def mutate_text(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a line, a number, a word or a sign; one time in five, bytes."""
    text = data.decode("utf-8", errors="replace")
    place = int(rng.integers(0, len(text) + 1))
    lines = text.splitlines(keepends=True)
    chosen = int(rng.integers(0, max(len(lines), 1)))
    match int(rng.integers(0, 8)):
        case 0 | 1:
            return mutate_bytes(rng, data)
        case 2 | 3:
            found = list(re.finditer(r"-?\d+(\.\d+)?", text))
            if found:
                spot = found[int(rng.integers(0, len(found)))]
                text = text[: spot.start()] + str(rng.choice(WORDS)) + text[spot.end() :]
        case 4:
            found = list(re.finditer(r"\w+", text))
            if found:
                spot = found[int(rng.integers(0, len(found)))]
                text = text[: spot.start()] + str(rng.choice(WORDS)) + text[spot.end() :]
        case 5:
            text = text[:place] + SIGNS[int(rng.integers(0, len(SIGNS)))] + text[place:]
        case 6:
            text = "".join(lines[:chosen] + lines[chosen + 1 :])
        case _:
            text = "".join(lines[: chosen + 1] + lines[chosen:])
    return text.encode("utf-8", errors="surrogatepass")


def mutate_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a value of a document, or of one line of JSON Lines; one time in four, its text."""
    if rng.random() < 0.25:
        return mutate_text(rng, data)
    try:
        return json.dumps(change_value(rng, json.loads(data))).encode()
    except ValueError:
        lines = data.decode().splitlines()
        chosen = int(rng.integers(0, len(lines)))
        lines[chosen] = json.dumps(change_value(rng, json.loads(lines[chosen])))
        return "\n".join([*lines, ""]).encode()


def mutate_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a value of the header of a pack; three times in four, without its checksum, which would hide the rest."""
    values = json.loads(data)
    return mutate_json(rng, json.dumps({**values, CHECKSUM: None}).encode() if rng.random() < 0.75 else data)


def change_value(rng: np.random.Generator, value: Any) -> Any:
    """Return a document with one value replaced, removed, renamed or added, at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[int(rng.integers(0, len(value)))]
        match int(rng.integers(0, 12)):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return {f"{name}{'s' * (name == key)}": each for name, each in value.items()}
            case 2:
                return {**value, "more": VALUES[int(rng.integers(0, len(VALUES)))]}
        return {**value, key: change_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(0, len(value)))
        match int(rng.integers(0, 8)):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value[: place + 1] + value[place:]
        return [*value[:place], change_value(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value.startswith("{") and rng.random() < 0.9:
        return json.dumps(change_value(rng, json.loads(value)))
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.3:
        return value * [-1, 0, 2, 0.5, 1e6][int(rng.integers(0, 5))]
    return VALUES[int(rng.integers(0, len(VALUES)))]


def mutate_tensors(rng: np.random.Generator, data: bytes) -> bytes:
    """Change the header of a .safetensors file and keep the file readable; half of the time, bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    values, content = split_tensors(data)  # without the checksum, which would hide the rest
    header = json.dumps(change_value(rng, values)).encode()
    return struct.pack("<Q", len(header)) + header + content


def mutate_pickle(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a value of a dict of `torch.save`; half of the time, bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    content = torch.load(io.BytesIO(data), weights_only=True)
    buffer = io.BytesIO()
    torch.save(_change_pickled(rng, content), buffer)
    return buffer.getvalue()


def _change_pickled(rng: np.random.Generator, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = list(value)[int(rng.integers(0, len(value)))]
        if rng.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: _change_pickled(rng, value[key])}
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        kinds = (
            value[:0] if value.ndim else value,
            value.double(),
            value.to(torch.int64),
            value[None],
            value * math.nan,
        )
        return kinds[int(rng.integers(0, len(kinds)))]
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(change_value(rng, json.loads(value)))
    return VALUES[int(rng.integers(0, len(VALUES)))]
