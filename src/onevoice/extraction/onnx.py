"""Runs exported networks with ONNX Runtime and NumPy alone; PyTorch need not be installed.

    extractor = onevoice.onnx.load("FOLDER")            # what onevoice export wrote
    voice = extractor.enroll(recording, 16_000)         # or extractor.load_voice("alice.voice")
    estimate = extractor.extract(mixture, 16_000, voice)
    stream = extractor.stream(voice, 48_000)            # causal networks

The rules are those of `extractor`, with two differences: pauses of an enrollment are not cut out, because the network
that finds them needs PyTorch, and there is no check-up.
"""

import functools
import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from onevoice.audio import Mono, require_finite, require_not_silent, require_sample_rate, resample, to_mono
from onevoice.errors import AudioError, CheckpointError, ConfigError, MissingDependencyError
from onevoice.extraction.stream import Arrays, Prepared, Stream
from onevoice.files import split_tensors

CORE_SECONDS = 20.0
"""The part of a recording whose estimate one window gives. Windows need memory with the square of their length."""
MIN_ENROLLMENT_SECONDS = 0.5
VOICE = ("films", "keys", "values")
"""The inputs of `step.onnx` that hold the voice, and the outputs of `voice.onnx`."""


@dataclass(frozen=True)
class OnnxVoice:
    """The speaker embedding of one person."""

    embedding: Float[np.ndarray, "1 speaker_dim"]
    model_hash: str


class OnnxExtractor:
    """An exported network, ready to extract voices. Threads may share one."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self._threads = folder, threads
        self.facts = json.loads(self._session("enroll").get_modelmeta().custom_metadata_map["onevoice"])
        self.sample_rate: int = self.facts["sample_rate"]
        self.model_hash: str = self.facts["model_hash"]

    @property
    def card(self) -> dict[str, Any]:
        """The card of the weights."""
        return dict(self.facts["card"])

    def enroll(self, recording: np.ndarray, sample_rate: int) -> OnnxVoice:
        """Return the voice of a person from a recording of that person alone, as `Extractor.enroll`."""
        sound = self._read(recording, sample_rate, "enrollment")
        if len(sound) < MIN_ENROLLMENT_SECONDS * self.sample_rate:
            raise AudioError(
                f"enrollment: lasts {len(sound) / self.sample_rate:.2f} s; give 0.5 s at least, better 3 s"
            )
        sound, _, _ = self._normalize(sound)
        (embedding,) = self._session("enroll").run(None, {"ref": self._pad(sound)})
        return OnnxVoice(embedding, self.model_hash)

    def load_voice(self, path: str | Path) -> OnnxVoice:
        """Read a saved voice. Raises `CheckpointError` for an unreadable one, or one of other weights."""
        try:
            header, content = split_tensors(Path(path).read_bytes())
            model_hash = json.loads(header["__metadata__"]["onevoice_voice"])["model_hash"]
            first, last = header["embedding"]["data_offsets"]
            embedding = np.frombuffer(content[first:last], "<f4")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: is not a readable voice ({error}); make one with onevoice enroll"
            ) from error
        voice = OnnxVoice(embedding.reshape(header["embedding"]["shape"]), model_hash)
        self._require_own(voice)
        return voice

    def extract(self, mixture: np.ndarray, sample_rate: int, voice: OnnxVoice) -> Mono:
        """Return the voice in `mixture`, mono and at the mixture's rate, as `Extractor.extract`."""
        self._require_own(voice)
        mono = self._read(mixture, sample_rate, "mixture", self_rate=False)
        sound = resample(mono, sample_rate, self.sample_rate)
        normal, _, scale = self._normalize(sound)
        estimate = np.concatenate([scale * core for core in self._cores(normal, voice)])
        wide, heard = estimate.astype(np.float64), sound.astype(np.float64)
        most = self.facts["max_gain"] or math.inf
        energy = float(wide @ wide)
        gain = max(-most, min(float(heard @ wide) / energy, most)) if energy else 0.0
        output = resample((gain * wide).astype(np.float32), self.sample_rate, sample_rate)[: len(mono)]
        return np.pad(output, (0, len(mono) - len(output)))

    def stream(
        self, voice: OnnxVoice | None, sample_rate: int, strength: float = 1.0, absent_db: float = 0.0
    ) -> Stream:
        """Return a stream, as `Extractor.stream`. Raises `ConfigError` for a network that needs the whole recording."""
        return Stream(self.engine, voice, sample_rate, strength, absent_db=absent_db)

    @functools.cached_property
    def engine(self) -> "OnnxEngine":
        """Runs the steps of a causal network."""
        if self.facts["latency_seconds"] is None:
            raise ConfigError(f"{self.folder}: these weights need the whole recording; a stream needs a causal network")
        return OnnxEngine(self._session("voice"), self._session("step"), self.sample_rate, self._require_own)

    def _cores(self, sound: Mono, voice: OnnxVoice) -> list[Mono]:
        """Return the estimate in parts, each from a window with the context that the network needs."""
        hop, rate, context = self.facts["hop"], self.sample_rate, self.facts["context_seconds"]
        session, core = self._session("extract"), len(sound)
        around = 0 if context is None else (int(context * rate) // hop + 2) * hop
        if context is not None and len(sound) > CORE_SECONDS * rate + 2 * around:
            core = int(CORE_SECONDS * rate) // hop * hop
        cores = []
        for first in range(0, len(sound), core):
            begin, last = max(0, first - around), min(first + core, len(sound))
            window = sound[begin : min(last + around, len(sound))]
            (estimate,) = session.run(None, {"audio": self._pad(window), "embedding": voice.embedding})
            cores.append(estimate[0, first - begin : last - begin])
        return cores

    def _read(self, sound: np.ndarray, sample_rate: int, name: str, self_rate: bool = True) -> Mono:
        require_sample_rate(sample_rate, name)
        if not isinstance(sound, np.ndarray) or sound.ndim not in (1, 2) or not np.issubdtype(sound.dtype, np.floating):
            raise AudioError(f"{name}: give a float array, (samples,) or (channels, samples), with full scale 1.0")
        mono = np.ascontiguousarray(sound if sound.ndim == 1 else to_mono(sound), np.float32)
        require_finite(mono, name)
        require_not_silent(mono, name)
        return resample(mono, sample_rate, self.sample_rate) if self_rate else mono

    def _normalize(self, sound: Mono) -> tuple[Mono, float, float]:
        """Return a sound at the level at which the network works, its offset, and its level."""
        if not self.facts["normalize_level"]:
            return sound, 0.0, 1.0
        mean = float(sound.mean(dtype=np.float64))
        level = float(np.sqrt(np.square(sound - np.float32(mean), dtype=np.float64).mean()))
        return ((sound - mean) / level).astype(np.float32), mean, level

    def _pad(self, sound: Mono) -> Float[np.ndarray, "1 samples"]:
        multiple = self.facts["multiple_of"]
        return np.pad(sound, (0, max(-len(sound) % multiple, 2 * multiple - len(sound))))[None]

    def _require_own(self, voice: OnnxVoice) -> None:
        if voice.model_hash != self.model_hash:
            raise CheckpointError("voice: belongs to other weights; enroll it with these")

    def _session(self, name: str) -> Any:
        return open_session(self.folder / f"{name}.onnx", self._threads)


class OnnxEngine:
    """Runs the steps of an exported causal network; threads may share one."""

    def __init__(self, voice: Any, step: Any, sample_rate: int, check: Any) -> None:
        self._voice, self._step, self._check, self.sample_rate = voice, step, check, sample_rate
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        inputs = {each.name: (each.shape, kinds[each.type]) for each in step.get_inputs()}
        self.hop: int = inputs.pop("samples")[0][1]
        self._state = {name: shape for name, shape in inputs.items() if name not in VOICE}

    def start(self) -> Arrays:
        """Return the state at the start of a stream."""
        return {name: np.zeros(shape, kind) for name, (shape, kind) in self._state.items()}

    def prepare(self, voice: OnnxVoice) -> Prepared:
        """Return what the steps need of a voice."""
        self._check(voice)
        return tuple(self._voice.run(None, {"embedding": voice.embedding}))

    def step(self, samples: Mono, voice: Prepared, state: Arrays) -> tuple[Mono, Arrays]:
        """Return the estimate, one hop behind `samples`, and the next state. Other threads run meanwhile."""
        constant, parts = dict(zip(VOICE, voice, strict=True)), []
        for hop in samples.reshape(-1, 1, self.hop):
            estimate, *after = self._step.run(None, {"samples": hop, **constant, **state})
            state = dict(zip(self._state, after, strict=True))
            parts.append(estimate[0])
        return np.concatenate(parts), state


def load(folder: str | Path, threads: int = 1) -> OnnxExtractor:
    """Open what `onevoice export` wrote to a folder; `threads` is the number of threads of each network.

    Raises `CheckpointError` for files that are missing or damaged, and `MissingDependencyError` without onnxruntime.
    """
    return OnnxExtractor(Path(folder), threads)


@functools.lru_cache(maxsize=16)
def open_session(path: Path, threads: int) -> Any:
    """Return an ONNX Runtime session on the CPU."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError('onnx: needs onnxruntime: pip install "onevoice[onnx]"') from error
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; write it with onevoice export MODEL {path.parent}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises several classes of its own for a damaged file
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}); export it again") from error
