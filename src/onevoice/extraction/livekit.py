"""The frame processor for LiveKit: a track with one voice only.

stream = rtc.AudioStream(track, noise_cancellation=VoiceProcessor(extractor, voice))
"""

import numpy as np
from livekit import rtc

from onevoice.extraction.extractor import Extractor
from onevoice.extraction.stream import Stream
from onevoice.extraction.voice import Voice


class VoiceProcessor(rtc.FrameProcessor[rtc.AudioFrame]):  # type: ignore[misc]
    """Takes one voice out of the frames of a track: `voice`, or the first one that speaks for 3 s.

    Each frame comes back whole, so the first ones begin with silence, as long as the latency. Channels are averaged,
    and all of them get the voice. Where it is not heard, it is turned down by `absent_db`.
    """

    def __init__(
        self, extractor: Extractor, voice: Voice | None = None, strength: float = 1.0, absent_db: float = 0.0
    ) -> None:
        self._extractor, self._voice, self._strength, self._absent_db = extractor, voice, strength, absent_db
        self._stream: Stream | None = None
        self._ready = np.zeros(0, np.int16)
        self._enabled = True

    @property
    def enabled(self) -> bool:
        """Whether LiveKit sends frames through it."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value

    def _process(self, frame: rtc.AudioFrame) -> rtc.AudioFrame:
        if self._stream is None:
            self._stream = self._open(frame.sample_rate)
        heard = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels).T
        output = self._stream.push(heard, frame.sample_rate)
        self._ready = np.concatenate([self._ready, output])
        missing = frame.samples_per_channel - len(self._ready)
        if missing > 0:
            self._ready = np.concatenate([np.zeros(missing, np.int16), self._ready])
        mono, self._ready = np.split(self._ready, [frame.samples_per_channel])
        data = np.repeat(mono, frame.num_channels).tobytes()
        return rtc.AudioFrame(data, frame.sample_rate, frame.num_channels, frame.samples_per_channel)

    def _open(self, sample_rate: int) -> Stream:
        self._ready = np.zeros(0, np.int16)
        if self._voice is not None:
            return self._extractor.stream(self._voice, sample_rate, self._strength, self._absent_db)
        stream = self._extractor.live(sample_rate)
        stream.strength, stream.absent_db = self._strength, self._absent_db
        return stream

    def _close(self) -> None:
        self._stream = None
