"""The audio filter for Pipecat: an agent hears one voice only.

params = TransportParams(audio_in_enabled=True, audio_in_filter=VoiceFilter(extractor, voice))
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pipecat.audio.filters.base_audio_filter import BaseAudioFilter
from pipecat.frames.frames import FilterControlFrame, FilterEnableFrame, FilterUpdateSettingsFrame

from onevoice.extraction.extractor import Extractor
from onevoice.extraction.stream import Stream
from onevoice.extraction.voice import Voice


class VoiceFilter(BaseAudioFilter):  # type: ignore[misc]
    """Takes one voice out of the input of a transport: `voice`, or the first one that speaks for 3 s.

    Blocks are computed in a thread, so that the event loop goes on. The first blocks come back shorter, by the latency.
    `FilterEnableFrame` switches between the voice and the mixture, and `FilterUpdateSettingsFrame` sets the `strength`.
    Where the voice is not heard, it is turned down by `absent_db`.
    """

    def __init__(
        self, extractor: Extractor, voice: Voice | None = None, strength: float = 1.0, absent_db: float = 0.0
    ) -> None:
        self._extractor, self._voice, self._strength, self._absent_db = extractor, voice, strength, absent_db
        self._is_enabled = True
        self._stream: Stream | None = None
        self._worker: ThreadPoolExecutor | None = None

    async def start(self, sample_rate: int) -> None:
        """Open the stream at the rate of the transport, in Hz."""
        if self._voice is None:
            self._stream = self._extractor.live(sample_rate)
        else:
            self._stream = self._extractor.stream(self._voice, sample_rate)
        self._stream.strength = self._strength if self._is_enabled else 0.0
        self._stream.absent_db = self._absent_db
        self._worker = ThreadPoolExecutor(1, "onevoice")

    async def stop(self) -> None:
        """Close the stream."""
        if self._worker is not None:
            self._worker.shutdown(wait=False)
        self._stream = self._worker = None

    async def process_frame(self, frame: FilterControlFrame) -> None:
        """Switch the filter on or off, or set its strength."""
        if isinstance(frame, FilterUpdateSettingsFrame) and "strength" in frame.settings:
            self._strength = float(frame.settings["strength"])
        elif isinstance(frame, FilterEnableFrame):
            self._is_enabled = frame.enable
        if self._stream is not None:
            self._stream.strength = self._strength if self._is_enabled else 0.0

    async def filter(self, audio: bytes) -> bytes:
        """Return the voice in a block of 16-bit mono samples."""
        if self._stream is None:
            return audio
        return await asyncio.get_running_loop().run_in_executor(self._worker, _push, self._stream, audio)


def _push(stream: Stream, audio: bytes) -> bytes:
    return stream.push(np.frombuffer(audio, np.int16)).tobytes()
