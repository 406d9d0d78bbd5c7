"""What a stream gets from PyTorch: the steps of the network, and the voice of the first person who speaks."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from onevoice.audio import Mono
from onevoice.extraction.discovery import find_voices
from onevoice.extraction.stream import Arrays, Prepared
from onevoice.extraction.vad import find_speech
from onevoice.extraction.voice import Voice
from onevoice.models import Network
from onevoice.models.streaming import Step, VoiceTensors

NEEDED_SECONDS = 3.0
"""A person who has spoken for this long is enrolled."""
SEARCH_SECONDS = 0.5
"""New sound between two searches."""
MAX_HEARD_SECONDS = 30.0
"""The last sound that is searched."""


class TorchEngine:
    """Runs the steps of a causal network in PyTorch; threads may share one.

    Raises `ConfigError` for a network that needs the whole recording.
    """

    def __init__(self, model: Network, model_hash: str, compiled: bool = False) -> None:
        self._step = Step(model).eval()
        self._run: Callable[..., Any] = torch.compile(self._step, dynamic=False) if compiled else self._step
        self._device = next(model.parameters()).device
        self.model_hash = model_hash
        self.sample_rate, self.hop = model.config.sample_rate, model.config.hop

    def start(self) -> Arrays:
        """Return the state at the start of a stream."""
        return {name: value.cpu().numpy() for name, value in self._step.start().items()}

    @torch.inference_mode()
    def prepare(self, voice: Voice) -> Prepared:
        """Return what the steps need of a voice. Raises `CheckpointError` for the voice of other weights."""
        voice.require_model(self.model_hash)
        return self._step.prepare(voice.embedding.to(self._device))

    @torch.inference_mode()
    def step(self, samples: Mono, voice: Prepared, state: Arrays) -> tuple[Mono, Arrays]:
        """Return the estimate, one hop behind `samples`, and the next state. Other threads run meanwhile."""
        given = {name: torch.from_numpy(value).to(self._device) for name, value in state.items()}
        sound = torch.from_numpy(samples)[None].to(self._device)
        estimate, after = self._run(sound, VoiceTensors(*voice), given)
        return estimate[0].cpu().numpy(), {name: value.cpu().numpy() for name, value in after.items()}


class FirstVoice:
    """Listens to a stream until one person has spoken for `NEEDED_SECONDS`, and returns that person's voice."""

    def __init__(self, enroll: Callable[[Mono, int], Voice], sample_rate: int, background: bool) -> None:
        self._enroll, self._rate = enroll, sample_rate
        self._heard = np.zeros(0, np.float32)
        self._new = 0
        self._worker = ThreadPoolExecutor(1, "first-voice") if background else None
        self._search: Future[Voice | None] | None = None

    def __call__(self, samples: Mono) -> Voice | None:
        """Take the next block; return the voice once it is known."""
        self._heard = np.concatenate([self._heard, samples])[-round(MAX_HEARD_SECONDS * self._rate) :]
        self._new += len(samples)
        if self._search is not None and not self._search.done():
            return None
        voice = None if self._search is None else self._search.result()
        self._search = None
        if voice is None and self._new >= SEARCH_SECONDS * self._rate:
            self._new = 0
            if self._worker is None:
                return self._find(self._heard)
            self._search = self._worker.submit(self._find, self._heard)
        if voice is not None and self._worker is not None:
            self._worker.shutdown(wait=False)
        return voice

    def _find(self, sound: Mono) -> Voice | None:
        speech = find_speech(sound, self._rate)
        if sum(end - begin for begin, end in speech) < NEEDED_SECONDS:
            return None
        person = max(find_voices(sound, self._rate, speech), key=lambda found: found.seconds)
        return (
            self._enroll(person.enrollment(sound, self._rate), self._rate) if person.seconds >= NEEDED_SECONDS else None
        )
