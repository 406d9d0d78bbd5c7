"""Plans as sound: excerpts, rooms, mixing, noise and levels of a whole batch, as tensor operations on any device.

The same code renders in a data loader's worker, from a memory-mapped pack, and on a GPU that holds whole packs. Only
the way to fetch excerpts differs (`fetch`), and a test compares both. The steps, per trial:

1. Target and interferers are excerpts of `segment_seconds`. With rooms, each is convolved with its response, which is
   cut to start at the direct sound and scaled so that its early part has unit energy.
2. Each interferer is scaled so that 10 log10(|target|² / |interferer|²) = snr_db over the segment. If target or
   interferer is silent, the scale stays 1.
3. Noise is scaled to be snr_db below the sum of the voices.
4. One gain brings the mixture to its RMS level, or to less if a peak of mixture or target would exceed 0.9. The target
   (with rooms, its early part) shares that gain. An absent target is silence.
5. The enrollment passes its own room and channel and is brought to its own RMS level, or to less if its peak would
   exceed 0.9.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from onevoice.corpus.pack import SAMPLES, PackedCorpus
from onevoice.mixing.draw import ChannelPlan, Excerpts, NoisePlan, Plan, Planner, RoomPlan
from onevoice.mixing.levels import snr_gain

MAX_PEAK = 0.9
"""The highest peak that the gain of a mixture, target or enrollment may reach."""
CHANNEL_ORDER = 4
"""Order of the Butterworth filters at the band limits: they fall by this many times 6 dB per octave."""
MU = 255.0
"""The parameter of the mu-law curve (ITU-T G.711)."""

Wave = Float[Tensor, "batch samples"]
Rows = Float[Tensor, " batch"]


class RenderedBatch(NamedTuple):
    """A batch of trials as sound."""

    audio: Wave
    target: Float[Tensor, "batch samples"]
    ref: Float[Tensor, "batch ref_samples"]
    ref_length: Int[Tensor, " batch"]
    speaker: Int[Tensor, " batch"]


class Renderer:
    """Renders the plans of one `Planner` on one device."""

    def __init__(self, planner: Planner, device: torch.device | str = "cpu") -> None:
        self.planner = planner
        self.device = torch.device(device)
        self.speech = _to_device(planner.speech, self.device)
        self.noise = None if planner.noise is None else _to_device(planner.noise[1], self.device)
        if planner.reverb is not None:
            step, pack = planner.reverb
            self.responses = _to_device(pack, self.device)
            self.early = round(step.early_seconds * pack.sample_rate)
            self.direct = _direct_sounds(pack)

    def __call__(self, plan: Plan) -> RenderedBatch:
        """Return the trials of a plan."""
        target = self._fetch(plan.target, self.planner.segment)
        interferers = [self._fetch(excerpts, self.planner.segment) for excerpts in plan.interferers]
        # The mixture holds all of the target, `wanted` what the network must return: in a room, the early part.
        wanted = target
        if plan.rooms is not None:
            wanted, target = self._in_room(target, plan.rooms, 0)
            interferers = [self._in_room(each, plan.rooms, 1 + k)[1] for k, each in enumerate(interferers)]
        mixture = target.clone()
        energy = _energy(target)
        for k, interferer in enumerate(interferers):
            gain = _snr_gain_or_one(energy, _energy(interferer), self._floats(plan.snr_db[:, k]))
            mixture.addcmul_(interferer, (gain * self._floats(plan.interferer_on[:, k]))[:, None])
        if plan.noise is not None:
            self._add_noise(plan.noise, mixture)
        full = torch.full_like(energy, mixture.shape[1])
        gain = torch.minimum(_gain_to_level(mixture, self._floats(plan.mixture_dbfs), full), MAX_PEAK / _peak(wanted))
        return RenderedBatch(
            audio=mixture.mul_(gain[:, None]),  # in place: fresh memory costs as much as the arithmetic
            target=wanted.mul_((gain * self._floats(~plan.absent))[:, None]),
            ref=self._enrollment(plan),
            ref_length=self._integers(plan.enrollment.length),
            speaker=self._integers(plan.speaker),
        )

    def _enrollment(self, plan: Plan) -> Wave:
        length = plan.enrollment.length
        ref = self._fetch(plan.enrollment, int(length.max()))
        if plan.rooms is not None:
            enrolled = plan.rooms._replace(on=plan.rooms.enrollment_on)
            ref = self._in_room(ref, enrolled, plan.rooms.responses.shape[1] - 1)[1]
        if plan.channel is not None:
            ref = self._through_channel(ref, plan.channel)
        if plan.rooms is not None or plan.channel is not None:
            # Cut off the tails of rooms and filters beyond the end of each enrollment.
            ref = ref * (torch.arange(ref.shape[1], device=self.device) < self._integers(length)[:, None])
        return ref.mul_(_gain_to_level(ref, self._floats(plan.enrollment_dbfs), self._floats(length))[:, None])

    def _fetch(self, excerpts: Excerpts, size: int) -> Wave:
        offset = self.planner.speech.offset[excerpts.utterance] + excerpts.start
        return fetch(self.speech, offset, excerpts.length, excerpts.position, size)

    def _add_noise(self, noise: NoisePlan, voices: Wave) -> None:
        assert self.planner.noise is not None
        assert self.noise is not None
        pack, size = self.planner.noise[1], voices.shape[1]
        offset, length = pack.offset[noise.recording], pack.length[noise.recording]
        sound = fetch_repeated(self.noise, offset, length, noise.start, size)
        gain = _snr_gain_or_one(_energy(voices), _energy(sound), self._floats(noise.snr_db)) * self._floats(noise.on)
        voices.addcmul_(sound, gain[:, None])

    def _in_room(self, dry: Wave, rooms: RoomPlan, voice: int) -> tuple[Wave, Wave]:
        """Return the early part and the whole of a voice in its room; without a room, the dry voice twice."""
        assert self.planner.reverb is not None
        pack, number = self.planner.reverb[1], rooms.responses[:, voice]
        # Cut each response to start at its direct sound, and split off its early part.
        length = pack.length[number] - self.direct[number]
        size = int(length.max())
        response = fetch(self.responses, pack.offset[number] + self.direct[number], length, np.zeros_like(length), size)
        early = response * (torch.arange(size, device=self.device) < self.early)
        scale = torch.rsqrt(_energy(early).clamp(min=1e-12))[:, None]
        # Convolve by FFT, long enough that nothing wraps around.
        points = 1 << (dry.shape[1] + size - 1).bit_length()
        spectrum = torch.fft.rfft(dry, points)
        wet_early, wet = (
            torch.fft.irfft(spectrum * torch.fft.rfft(scale * taps, points), points)[:, : dry.shape[1]]
            for taps in (early, response)
        )
        on = self._floats(rooms.on)[:, None] > 0
        return torch.where(on, wet_early, dry), torch.where(on, wet, dry)

    def _through_channel(self, ref: Wave, channel: ChannelPlan) -> Wave:
        rate = self.planner.speech.sample_rate
        # The FFT has room for the longest enrollment of all batches, so that a trial does not depend on its batch, and
        # for a tenth of a second in which the filters decay.
        longest = max(ref.shape[1], round(self.planner.mixing.enrollment_seconds[1] * rate))
        points = 1 << (longest + rate // 10).bit_length()
        # Multiply the spectrum by the Butterworth magnitudes of both band limits and by the tilt.
        hz = torch.linspace(0, rate / 2, points // 2 + 1, device=self.device).clamp(min=1.0)
        low, high = self._floats(channel.low_cut_hz)[:, None], self._floats(channel.high_cut_hz)[:, None]
        gain = torch.rsqrt(1 + (low / hz) ** (2 * CHANNEL_ORDER)) * torch.rsqrt(1 + (hz / high) ** (2 * CHANNEL_ORDER))
        tilt = self._floats(channel.tilt_db_per_octave)[:, None] * torch.log2(hz.clamp(min=50.0) / 1000)
        shaped = torch.fft.irfft(torch.fft.rfft(ref, points) * gain * 10 ** (tilt / 20), points)[:, : ref.shape[1]]
        coded = torch.where(self._floats(channel.codec)[:, None] > 0, mu_law(shaped), shaped)
        return torch.where(self._floats(channel.on)[:, None] > 0, coded, ref)

    def _floats(self, values: np.ndarray) -> Rows:
        return torch.from_numpy(values.astype(np.float32)).to(self.device, non_blocking=True)

    def _integers(self, values: np.ndarray) -> Int[Tensor, " batch"]:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def fetch(
    samples: Int16[Tensor, " total"], offset: np.ndarray, length: np.ndarray, position: np.ndarray, size: int
) -> Wave:
    """Return for each row `length` samples from `offset` on, placed at `position` in `size` zeros, full scale 1.0."""
    if samples.device.type == "cpu":
        rows = torch.empty(len(offset), size)
        for row, begin, count, at in zip(rows, offset.tolist(), length.tolist(), position.tolist(), strict=True):
            row[:at] = 0
            torch.mul(samples[begin : begin + count], 1 / 32768, out=row[at : at + count])
            row[at + count :] = 0
        return rows
    return gather(samples, offset - position, position, position + length, size)


def gather(samples: Int16[Tensor, " total"], base: np.ndarray, first: np.ndarray, after: np.ndarray, size: int) -> Wave:
    """Fetch by one indexing operation: column c of a row is sample `base + c` for first ≤ c < after, else 0."""
    base_, first_, after_ = (
        torch.from_numpy(numbers).to(samples.device, non_blocking=True)[:, None] for numbers in (base, first, after)
    )
    column = torch.arange(size, device=samples.device)
    valid = (column >= first_) & (column < after_)
    return samples[torch.where(valid, base_ + column, 0)].float() * (valid / 32768)


def fetch_repeated(
    samples: Int16[Tensor, " total"], offset: np.ndarray, length: np.ndarray, start: np.ndarray, size: int
) -> Wave:
    """Return `size` samples of each recording from `start` on; at its end it starts again."""
    offset_, length_, start_ = (
        torch.from_numpy(numbers).to(samples.device, non_blocking=True)[:, None] for numbers in (offset, length, start)
    )
    column = torch.arange(size, device=samples.device)
    return samples[offset_ + (start_ + column) % length_].float() / 32768


def mu_law(samples: Wave) -> Wave:
    """Code and decode samples by 8-bit mu-law, with the peak of each row as full scale."""
    peak = samples.abs().amax(1, keepdim=True).clamp(min=1e-9)
    x = samples / peak
    code = torch.round(torch.sign(x) * torch.log1p(MU * x.abs()) / np.log1p(MU) * 127) / 127
    return peak * torch.sign(code) * torch.expm1(code.abs() * np.log1p(MU)) / MU


def _to_device(pack: PackedCorpus, device: torch.device) -> Int16[Tensor, " total"]:
    file = str(pack.path / SAMPLES)
    return torch.from_file(file, shared=False, size=len(pack.samples), dtype=torch.int16).to(device)


def _direct_sounds(pack: PackedCorpus) -> Int[np.ndarray, " responses"]:
    """Return the index of the largest sample of each response."""
    return np.array(
        [
            int(np.abs(pack.samples[begin : begin + count].astype(np.int32)).argmax())
            for begin, count in zip(pack.offset, pack.length, strict=True)
        ]
    )


def _energy(signal: Wave) -> Rows:
    norm: Tensor = torch.linalg.vector_norm(signal, dim=1)  # one pass, without a temporary array
    return norm.square()


def _peak(signal: Wave) -> Rows:
    return torch.maximum(signal.amax(1), -signal.amin(1)).clamp(min=1e-9)  # 20 times as fast as aminmax on a CPU


def _snr_gain_or_one(reference_energy: Rows, energy: Rows, snr_db: Rows) -> Rows:
    """Return the gain after which the reference is `snr_db` above a signal of `energy`; 1 if either is silent."""
    gain = snr_gain(reference_energy, energy.clamp(min=1e-20), snr_db)
    return torch.where((reference_energy > 0) & (energy > 0), gain, 1.0)


def _gain_to_level(signal: Wave, level_dbfs: Rows, length: Rows) -> Rows:
    """Return the gain to an RMS level over the `length` valid samples, less if a peak would exceed `MAX_PEAK`."""
    power = (_energy(signal) / length).clamp(min=1e-20)
    return torch.minimum(10 ** (level_dbfs / 20) * torch.rsqrt(power), MAX_PEAK / _peak(signal))
