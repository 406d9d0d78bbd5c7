"""The adapters for Pipecat and LiveKit, run against their packages if those are installed."""

import asyncio

import numpy as np
import pytest
from extraction.test_stream import EXTRACTOR, RATE, VOICE, noise, push_all

SOUND = (noise(4000) * 32767).astype(np.int16)
WANTED = push_all(EXTRACTOR.stream(VOICE, RATE), SOUND, [80])


def test_pipecat() -> None:
    pytest.importorskip("pipecat")
    from pipecat.audio.filters.base_audio_filter import BaseAudioFilter
    from pipecat.frames.frames import FilterEnableFrame, FilterUpdateSettingsFrame

    from onevoice.extraction.pipecat import VoiceFilter

    async def run() -> None:
        voice_filter = VoiceFilter(EXTRACTOR, VOICE)
        assert isinstance(voice_filter, BaseAudioFilter)
        assert await voice_filter.filter(b"12") == b"12"
        await voice_filter.start(RATE)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        parts = [await voice_filter.filter(SOUND[first : first + 80].tobytes()) for first in range(0, 4000, 80)]
        ticking.cancel()
        assert ticks > len(parts)  # the loop went on while blocks were computed
        output = np.frombuffer(b"".join(parts), np.int16)
        np.testing.assert_array_equal(output, WANTED[: len(output)])
        assert len(output) >= 4000 - 2 * 128 - 80
        stream = voice_filter._stream
        assert stream is not None
        await voice_filter.process_frame(FilterUpdateSettingsFrame(settings={"strength": 0.5}))
        assert stream.strength == 0.5
        await voice_filter.process_frame(FilterEnableFrame(enable=False))
        assert stream.strength == 0
        await voice_filter.process_frame(FilterEnableFrame(enable=True))
        assert stream.strength == 0.5
        await voice_filter.stop()
        assert await voice_filter.filter(b"12") == b"12"
        live = VoiceFilter(EXTRACTOR, absent_db=20.0)
        await live.start(RATE)
        assert live._stream is not None
        assert live._stream.absent_db == 20.0
        assert live._stream.voice is None
        await live.stop()

    asyncio.run(run())


@pytest.mark.parametrize("channels", [1, 2])
def test_livekit(channels: int) -> None:
    rtc = pytest.importorskip("livekit.rtc")
    from onevoice.extraction.livekit import VoiceProcessor

    processor = VoiceProcessor(EXTRACTOR, VOICE)
    assert isinstance(processor, rtc.FrameProcessor)
    assert processor.enabled
    output = []
    for first in range(0, 4000, 80):
        data = np.repeat(SOUND[first : first + 80], channels).tobytes()
        frame = processor._process(rtc.AudioFrame(data, RATE, channels, 80))
        assert (frame.sample_rate, frame.num_channels, frame.samples_per_channel) == (RATE, channels, 80)
        samples = np.frombuffer(frame.data, np.int16).reshape(-1, channels)
        assert (samples == samples[:, :1]).all()
        output.append(samples[:, 0])
    heard = np.concatenate(output)
    most = 2 * 128 + 80  # two hops, and what a frame waits for the next hop
    late = [lag for lag in range(most + 1) if np.abs(heard[lag:] - WANTED[: len(heard) - lag].astype(int)).max() <= 1]
    assert late
    processor.enabled = False
    assert not processor.enabled
    processor._close()
    for voice in (VOICE, None):
        stream = VoiceProcessor(EXTRACTOR, voice, 0.5, 20.0)._open(RATE)
        assert (stream.strength, stream.absent_db) == (0.5, 20.0)
