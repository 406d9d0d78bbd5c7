"""Plans as sound: cropping, rooms, mixing, noise and levels of a whole batch, as tensor operations on any device.

The same code renders in a data loader's worker, from a memory-mapped pack, and on a GPU that holds the packs whole;
the one difference is how stretches are fetched (`fetch`), and both ways are tested to be equal. The law, per trial:

1. target and interferers are stretches of `segment_seconds`; with rooms each is convolved with its response, cut to
   begin at the direct sound and scaled so that its early part has unit energy;
2. each interferer is scaled so that 10 log10(|target|² / |interferer|²) = snr_db over the segment; a silent target or
   interferer leaves the scale at 1;
3. noise is scaled to stand snr_db below the sum of the voices;
4. one gain brings the mixture to its RMS level, or less where a peak of mixture or target would pass 0.9; the target,
   with rooms its early part, shares that gain; an absent target is silence;
5. the enrollment passes its own room and channel and is brought to its own RMS level, or less by its peak.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from onevoice.corpus.pack import SAMPLES, PackedCorpus
from onevoice.mixing.draw import Channel, Drawer, Noise, Part, Plan, Rooms

PEAK_LIMIT = 0.9
CHANNEL_ORDER = 4
"""Slope of the band limits in units of 6 dB per octave, as of a Butterworth filter of this order."""
MU = 255.0

Wave = Float[Tensor, "batch samples"]
Rows = Float[Tensor, " batch"]


class Rendered(NamedTuple):
    """A batch of trials as sound."""

    audio: Wave
    target: Float[Tensor, "batch samples"]
    ref: Float[Tensor, "batch ref_samples"]
    ref_length: Int[Tensor, " batch"]
    speaker: Int[Tensor, " batch"]


class Renderer:
    """Renders the plans of one `Drawer` on one device."""

    def __init__(self, drawer: Drawer, device: torch.device | str = "cpu") -> None:
        self.drawer = drawer
        self.device = torch.device(device)
        self.speech = _on(drawer.speech, self.device)
        self.noise = None if drawer.noise is None else _on(drawer.noise[1], self.device)
        if drawer.reverb is not None:
            step, pack = drawer.reverb
            self.responses = _on(pack, self.device)
            self.early = round(step.early_seconds * pack.sample_rate)
            self.direct = _direct_sounds(pack)

    def __call__(self, plan: Plan) -> Rendered:
        """Return the trials of a plan."""
        target = self._stretch(plan.target, self.drawer.segment)
        others = [self._stretch(part, self.drawer.segment) for part in plan.interferers]
        wanted = target
        if plan.rooms is not None:
            wanted, target = self._in_room(target, plan.rooms, 0)
            others = [self._in_room(other, plan.rooms, 1 + number)[1] for number, other in enumerate(others)]
        mixture = target.clone()
        energy = _energy(target)
        for number, other in enumerate(others):
            gain = _relative_gain(energy, _energy(other), self._rows(plan.snr_db[:, number]))
            mixture.addcmul_(other, (gain * self._rows(plan.interferer_on[:, number]))[:, None])
        if plan.noise is not None:
            self._add_noise(plan.noise, mixture)
        full = torch.full_like(energy, mixture.shape[1])
        gain = torch.minimum(_gain_to(mixture, self._rows(plan.mixture_dbfs), full), PEAK_LIMIT / _peak(wanted))
        return Rendered(
            audio=mixture.mul_(gain[:, None]),  # in place: fresh memory costs as much as the arithmetic
            target=wanted.mul_((gain * self._rows(~plan.absent))[:, None]),
            ref=self._enrollment(plan),
            ref_length=self._whole(plan.enrollment.length),
            speaker=self._whole(plan.speaker),
        )

    def _enrollment(self, plan: Plan) -> Wave:
        length = plan.enrollment.length
        ref = self._stretch(plan.enrollment, int(length.max()))
        if plan.rooms is not None:
            enrolled = plan.rooms._replace(on=plan.rooms.enrollment_on)
            ref = self._in_room(ref, enrolled, plan.rooms.responses.shape[1] - 1)[1]
        if plan.channel is not None:
            ref = self._through_channel(ref, plan.channel)
        if plan.rooms is not None or plan.channel is not None:  # their tails reach beyond the end
            ref = ref * (torch.arange(ref.shape[1], device=self.device) < self._whole(length)[:, None])
        return ref.mul_(_gain_to(ref, self._rows(plan.enrollment_dbfs), self._rows(length))[:, None])

    def _stretch(self, part: Part, size: int) -> Wave:
        offset = self.drawer.speech.offset[part.utterance] + part.start
        return fetch(self.speech, offset, part.length, part.place, size)

    def _add_noise(self, noise: Noise, voices: Wave) -> None:
        assert self.drawer.noise is not None
        assert self.noise is not None
        pack, size = self.drawer.noise[1], voices.shape[1]
        sound = fetch_repeated(self.noise, pack.offset[noise.clip], pack.length[noise.clip], noise.start, size)
        gain = _relative_gain(_energy(voices), _energy(sound), self._rows(noise.snr_db)) * self._rows(noise.on)
        voices.addcmul_(sound, gain[:, None])

    def _in_room(self, dry: Wave, rooms: Rooms, voice: int) -> tuple[Wave, Wave]:
        """Return the early part and the whole of a voice in its room; the dry voice twice where there is none."""
        assert self.drawer.reverb is not None
        pack, number = self.drawer.reverb[1], rooms.responses[:, voice]
        length = pack.length[number] - self.direct[number]
        size = int(length.max())
        response = fetch(self.responses, pack.offset[number] + self.direct[number], length, np.zeros_like(length), size)
        early = response * (torch.arange(size, device=self.device) < self.early)
        scale = torch.rsqrt(_energy(early).clamp(min=1e-12))[:, None]
        points = 1 << (dry.shape[1] + size - 1).bit_length()
        spectrum = torch.fft.rfft(dry, points)
        both = [
            torch.fft.irfft(spectrum * torch.fft.rfft(scale * part, points), points)[:, : dry.shape[1]]
            for part in (early, response)
        ]
        on = self._rows(rooms.on)[:, None] > 0
        return torch.where(on, both[0], dry), torch.where(on, both[1], dry)

    def _through_channel(self, ref: Wave, channel: Channel) -> Wave:
        rate = self.drawer.speech.sample_rate
        longest = max(ref.shape[1], round(self.drawer.mixing.enrollment_seconds[1] * rate))  # not that of the batch
        points = 1 << (longest + rate // 10).bit_length()  # a tenth of a second for the filters to fade
        hz = torch.linspace(0, rate / 2, points // 2 + 1, device=self.device).clamp(min=1.0)
        low, high = self._rows(channel.low_cut_hz)[:, None], self._rows(channel.high_cut_hz)[:, None]
        gain = torch.rsqrt(1 + (low / hz) ** (2 * CHANNEL_ORDER)) * torch.rsqrt(1 + (hz / high) ** (2 * CHANNEL_ORDER))
        tilt = self._rows(channel.tilt_db_per_octave)[:, None] * torch.log2(hz.clamp(min=50.0) / 1000)
        shaped = torch.fft.irfft(torch.fft.rfft(ref, points) * gain * 10 ** (tilt / 20), points)[:, : ref.shape[1]]
        coded = torch.where(self._rows(channel.codec)[:, None] > 0, mu_law(shaped), shaped)
        return torch.where(self._rows(channel.on)[:, None] > 0, coded, ref)

    def _rows(self, values: np.ndarray) -> Rows:
        return torch.from_numpy(values.astype(np.float32)).to(self.device, non_blocking=True)

    def _whole(self, values: np.ndarray) -> Int[Tensor, " batch"]:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def fetch(
    samples: Int16[Tensor, " total"], offset: np.ndarray, length: np.ndarray, place: np.ndarray, size: int
) -> Wave:
    """Return for each row `length` samples from `offset` on, laid at `place` into `size` zeros, full scale 1.0."""
    if samples.device.type == "cpu":
        rows = torch.empty(len(offset), size)
        for row, begin, count, at in zip(rows, offset.tolist(), length.tolist(), place.tolist(), strict=True):
            row[:at] = 0
            torch.mul(samples[begin : begin + count], 1 / 32768, out=row[at : at + count])
            row[at + count :] = 0
        return rows
    return gather(samples, offset - place, place, place + length, size)


def gather(samples: Int16[Tensor, " total"], base: np.ndarray, first: np.ndarray, after: np.ndarray, size: int) -> Wave:
    """Do what `fetch` does by one indexing operation: column c of a row is sample `base + c` for first ≤ c < after."""
    base_, first_, after_ = (
        torch.from_numpy(part).to(samples.device, non_blocking=True)[:, None] for part in (base, first, after)
    )
    column = torch.arange(size, device=samples.device)
    valid = (column >= first_) & (column < after_)
    return samples[torch.where(valid, base_ + column, 0)].float() * (valid / 32768)


def fetch_repeated(
    samples: Int16[Tensor, " total"], offset: np.ndarray, length: np.ndarray, start: np.ndarray, size: int
) -> Wave:
    """Return `size` samples of each clip from `start` on, beginning again at its end."""
    offset_, length_, start_ = (
        torch.from_numpy(part).to(samples.device, non_blocking=True)[:, None] for part in (offset, length, start)
    )
    column = torch.arange(size, device=samples.device)
    return samples[offset_ + (start_ + column) % length_].float() / 32768


def mu_law(samples: Wave) -> Wave:
    """Pass samples through 8-bit mu-law, each row at its full scale."""
    peak = samples.abs().amax(1, keepdim=True).clamp(min=1e-9)
    x = samples / peak
    code = torch.round(torch.sign(x) * torch.log1p(MU * x.abs()) / np.log1p(MU) * 127) / 127
    return peak * torch.sign(code) * torch.expm1(code.abs() * np.log1p(MU)) / MU


def _on(pack: PackedCorpus, device: torch.device) -> Int16[Tensor, " total"]:
    file = str(pack.path / SAMPLES)
    return torch.from_file(file, shared=False, size=len(pack.samples), dtype=torch.int16).to(device)


def _direct_sounds(pack: PackedCorpus) -> Int[np.ndarray, " responses"]:
    """Return where each response has its largest sample."""
    return np.array(
        [
            int(np.abs(pack.samples[begin : begin + count].astype(np.int32)).argmax())
            for begin, count in zip(pack.offset, pack.length, strict=True)
        ]
    )


def _energy(signal: Wave) -> Rows:
    norm: Tensor = torch.linalg.vector_norm(signal, dim=1)  # one pass, nothing stored
    return norm.square()


def _peak(signal: Wave) -> Rows:
    return torch.maximum(signal.amax(1), -signal.amin(1)).clamp(min=1e-9)  # 20 times as fast as aminmax on a CPU


def _relative_gain(reference: Rows, energy: Rows, level_db: Rows) -> Rows:
    """Return the factor after which `reference` stands `level_db` above a signal of `energy`; 1 where one is silent."""
    gain = torch.sqrt(reference / energy.clamp(min=1e-20)) * 10 ** (-level_db / 20)
    return torch.where((reference > 0) & (energy > 0), gain, 1.0)


def _gain_to(signal: Wave, level_dbfs: Rows, length: Rows) -> Rows:
    """Return the factor to an RMS level over the `length` valid samples, or less by the peak limit."""
    power = (_energy(signal) / length).clamp(min=1e-20)
    return torch.minimum(10 ** (level_dbfs / 20) * torch.rsqrt(power), PEAK_LIMIT / _peak(signal))
