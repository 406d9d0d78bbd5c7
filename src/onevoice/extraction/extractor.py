"""A trained network and what it does with arrays: a voice from enrollments, and that voice out of a mixture.

Rules for every use of a model:

- Channels are averaged; if they cancel each other, the loudest one is used. Mixture and enrollment are converted to the
  network's sample rate, and the estimate is converted back to the mixture's.
- The enrollment must last at least `MIN_ENROLLMENT_SECONDS` and must not be silent. A silent mixture gives silence.
- The level of the network's estimate is arbitrary (SI-SDR ignores it). So the estimate is scaled by the gain that
  leaves the smallest residual, ⟨mixture, estimate⟩ / ⟨estimate, estimate⟩. Then mixture = estimate + residual, and the
  two are orthogonal. A silent estimate stays silent.
- A network trained with `loss.level` has a level of its own and turns its estimate down if the voice is absent. Then
  the gain is at most `MAX_GAIN`, so that the estimate is not turned up again.
- Long recordings are processed in windows (`windows`), in constant memory.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from onevoice.audio import Mono, require_not_silent, require_sample_rate, resample, resample_blocks
from onevoice.errors import AudioError, ConfigError, OnevoiceError
from onevoice.extraction.arrays import as_given, as_mono
from onevoice.extraction.batches import GROUP, by_length
from onevoice.extraction.checkpoint import Card, load_model, resolve
from onevoice.extraction.engine import FirstVoice, TorchEngine
from onevoice.extraction.presence import THRESHOLD_DB, Presence, measure_presence
from onevoice.extraction.stream import Stream
from onevoice.extraction.vad import Stretch, as_mask, find_speech
from onevoice.extraction.voice import Voice, clipped_share, examine, trim
from onevoice.extraction.windows import (
    Spool,
    estimate_windows,
    fill_spools,
    least_residual_gain,
    make_plan,
    measure_level,
    resume_at,
)
from onevoice.models import Batch, ModelConfig, Network, to_network
from onevoice.models.base import Level, has_bfloat16, pick_device

MIN_ENROLLMENT_SECONDS = 0.5
"""Shorter enrollments raise an error; 3 s or more of clean speech are best."""
MAX_GAIN = 2.0
"""Largest gain (6 dB) for the estimate of a network with a level of its own."""

Precision = Literal["auto", "float32", "bfloat16"]
"""Of the matrix products in `Extractor.extract`; speaker embeddings and `Extractor.estimate` are always float32."""

Samples = TypeVar("Samples", np.ndarray, Tensor)


class Extractor:
    """A trained network, ready to extract voices. Threads may share one."""

    def __init__(self, model: Network, card: Card, precision: Precision = "float32") -> None:
        self.model = model.eval()
        self.card = card
        self.precision: Precision = pick_precision(self.device) if precision == "auto" else precision
        self.takes_batches = self.device.type != "cpu"
        """Take several recordings through the network at once; on a processor it is no faster."""

    @property
    def sample_rate(self) -> int:
        """The rate in Hz at which the network works; other rates are converted."""
        return self.card.config.sample_rate

    @property
    def device(self) -> torch.device:
        """The device that the network is on."""
        return next(self.model.parameters()).device

    @property
    def max_gain(self) -> float:
        """The largest gain for an estimate."""
        return MAX_GAIN if self.card.config.has_level else math.inf

    @functools.cached_property
    def model_hash(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def engine(self) -> TorchEngine:
        """Runs the network in steps. Raises `ConfigError` for a network that needs the whole recording."""
        return TorchEngine(self.model, self.model_hash)

    def stream(self, voice: Voice | None, sample_rate: int, strength: float = 1.0, absent_db: float = 0.0) -> Stream:
        """Return a stream that takes a voice out of blocks as they come; None passes them through."""
        return Stream(self.engine, voice, sample_rate, strength, absent_db=absent_db)

    def live(self, sample_rate: int, background: bool = True) -> Stream:
        """Return a stream that passes blocks through until it has heard 3 s of one voice, and then extracts that.

        The search takes a part of a second, now and then; with `background` no block waits for it.
        """
        return Stream(self.engine, None, sample_rate, listen=FirstVoice(self.enroll, sample_rate, background))

    def enroll(
        self,
        recordings: np.ndarray | Tensor | Sequence[np.ndarray | Tensor],
        sample_rate: int | Sequence[int],
        names: Sequence[str] = (),
        speech: Sequence[Sequence[Stretch]] | None = None,
    ) -> Voice:
        """Return the voice of a person from one recording or a list of them, of that person alone.

        Each recording is `(samples,)` or `(channels, samples)` with full scale 1.0. The rate is in Hz, one for all or
        one for each. `speech` has the stretches of speech in each, if they are known (`vad.find_speech`); all else is
        cut out. The check-up of the voice has warnings for what is likely to spoil an
        extraction. Raises `AudioError` for empty, silent, NaN or too short input.
        """
        given = [recordings] if isinstance(recordings, np.ndarray | Tensor) else list(recordings)
        sounds = [as_mono(each, "enrollment") for each in given]
        rates = [sample_rate] * len(sounds) if isinstance(sample_rate, int) else list(sample_rate)
        if not sounds or len(rates) != len(sounds):
            raise AudioError("enrollment: no recordings, or not one rate for each; give one or more")
        for sound, rate in zip(sounds, rates, strict=True):
            require_sample_rate(rate, "enrollment")
            check_enrollment(sound, rate, "enrollment")
        clipped = float(np.mean([clipped_share(sound) for sound in sounds]))
        sounds = [resample(sound, rate, self.sample_rate) for sound, rate in zip(sounds, rates, strict=True)]
        if speech is None:
            speech = [find_speech(sound, self.sample_rate) for sound in sounds]
        masks = [as_mask(each, len(sound), self.sample_rate) for each, sound in zip(speech, sounds, strict=True)]
        least = MIN_ENROLLMENT_SECONDS * self.sample_rate
        trimmed = [trim(sound, mask, least) for sound, mask in zip(sounds, masks, strict=True)]
        check_up = examine(sounds, masks, self.sample_rate, clipped)
        return replace(self.embed(trimmed), sources=tuple(names), check_up=check_up)

    @torch.inference_mode()
    def embed(self, sounds: Sequence[Mono]) -> Voice:
        """Return the voice of mono recordings at the network's rate. Several are brought to one level and joined."""
        if len(sounds) > 1:
            sounds = [(sound - sound.mean()) / max(float(sound.std()), 1e-12) for sound in sounds]
        ref = torch.from_numpy(np.concatenate(sounds))[None].to(self.device)
        return Voice(self.model.embed(ref).float().cpu().clone(), self.model_hash)

    @overload
    def extract(
        self,
        mixture: Samples,
        sample_rate: int,
        voice: Voice | np.ndarray | Tensor,
        enrollment_sample_rate: int | None = None,
    ) -> Samples: ...

    @overload
    def extract(
        self,
        mixture: list[Samples],
        sample_rate: int,
        voice: Voice | np.ndarray | Tensor,
        enrollment_sample_rate: int | None = None,
    ) -> list[Samples]: ...

    def extract(
        self,
        mixture: Any,
        sample_rate: int,
        voice: Voice | np.ndarray | Tensor,
        enrollment_sample_rate: int | None = None,
    ) -> Any:
        """Return the voice in `mixture`: mono, `(samples,)`, at the mixture's rate, type and device.

        A mixture is `(samples,)` or `(channels, samples)` with full scale 1.0; a list of mixtures gives a list. `voice`
        comes from `enroll`, or is an enrollment in the form of a mixture. Rates are in Hz; the enrollment's is the
        mixture's by default. Silence gives silence. Raises `AudioError` for an empty, integer or NaN mixture, and what
        `enroll` raises.
        """
        require_sample_rate(sample_rate, "mixture")
        batch = mixture if isinstance(mixture, list) else [mixture]
        sounds = [as_mono(each, "mixture") for each in batch]
        if not isinstance(voice, Voice):
            rate = sample_rate if enrollment_sample_rate is None else enrollment_sample_rate
            voice = self.enroll(voice, rate)
        size = GROUP if self.takes_batches else 1
        groups = [sounds[first : first + size] for first in range(0, len(sounds), size)]
        estimates = [estimate for group in groups for estimate in self._extract_group(group, sample_rate, voice)]
        results = [as_given(estimate, given) for estimate, given in zip(estimates, batch, strict=True)]
        return results if isinstance(mixture, list) else results[0]

    def _extract_group(self, sounds: Sequence[Mono], sample_rate: int, voice: Voice) -> list[Mono]:
        with contextlib.ExitStack() as stack:
            pairs = [(stack.enter_context(Spool()), stack.enter_context(Spool())) for _ in sounds]
            for (heard, _), sound in zip(pairs, sounds, strict=True):
                fill_spools([heard], [sound[:, None]], sample_rate, self.sample_rate)
            self.estimate_together([(*pair, voice) for pair in pairs])
            gains = [self.separate(*pair, voice) for pair in pairs]
            return [
                np.concatenate(list(at_rate(estimate, gain, self.sample_rate, sample_rate, len(sound))))
                for (_, estimate), gain, sound in zip(pairs, gains, sounds, strict=True)
            ]

    def extract_with_presence(
        self, mixture: Samples, sample_rate: int, voice: Voice, *, absent_db: float = 0.0
    ) -> tuple[Samples, Presence]:
        """Return the voice in `mixture` as `extract` does, and where it is heard.

        Where it is not heard, the result is turned down by `absent_db`; infinity mutes. Raises `ConfigError` if the
        weights cannot tell, because they were trained without `loss.level`.
        """
        self.require_level()
        require_sample_rate(sample_rate, "mixture")
        sound = as_mono(mixture, "mixture")
        with Spool() as heard, Spool() as estimate:
            fill_spools([heard], [sound[:, None]], sample_rate, self.sample_rate)
            gain = self.separate(heard, estimate, voice)
            presence = self.presence(heard, estimate)
            blocks = at_rate(estimate, gain, self.sample_rate, sample_rate, len(sound), presence, absent_db)
            result: Any = as_given(np.concatenate(list(blocks)), mixture)
        return result, presence

    def presence(self, mixture: Spool, estimate: Spool) -> Presence:
        """Return where the voice is heard, from what `separate` got and appended."""
        threshold = self.card.facts.get("presence_threshold_db", THRESHOLD_DB)
        return measure_presence(mixture, estimate, self.sample_rate, float(threshold))

    def require_level(self) -> None:
        """Raise `ConfigError` if the level of the estimates tells nothing about presence."""
        if not self.card.config.has_level:
            raise ConfigError(
                "these weights do not tell where the voice is absent; use the default ones, or train with loss.level"
            )

    def extract_chunks(self, chunks: Iterable[np.ndarray], sample_rate: int, voice: Voice) -> Iterator[Mono]:
        """Yield the voice in a mono recording that comes in chunks; memory does not grow with its length.

        The level of the whole matters, so nothing comes out before the last chunk is in. The lengths add up to the
        length of the recording. Raises `AudioError` for a recording that is empty or not finite.
        """
        blocks = (as_mono(chunk, "mixture")[:, None] for chunk in chunks)
        with Spool() as mixture, Spool() as estimate:
            samples, _ = fill_spools([mixture], blocks, sample_rate, self.sample_rate)
            if not samples:
                raise AudioError("mixture: holds no samples")
            gain = self.separate(mixture, estimate, voice)
            yield from at_rate(estimate, gain, self.sample_rate, sample_rate, samples)

    @torch.inference_mode()
    def separate(
        self, mixture: Spool, estimate: Spool, voice: Voice, report: Callable[[int], None] = lambda samples: None
    ) -> float:
        """Append the estimate for `mixture`, at the network's rate, to `estimate`; return the gain to apply to it.

        `estimate` may hold the beginning from a run that was interrupted. `report` gets the number of samples done.
        Raises `CheckpointError` for the voice of other weights.
        """
        voice.require_model(self.model_hash)
        level = measure_level(mixture)
        if level.rms == 0:
            estimate.append_silence(mixture.samples - estimate.samples)
            return 0.0
        plan = make_plan(self.card.config, mixture.samples)
        done = resume_at(plan, estimate)
        report(estimate.samples)
        run = functools.partial(self._estimate_window, voice.embedding.to(self.device))
        threads = torch.get_num_threads() if self.device.type == "cpu" and plan.count > 1 else 1
        for core in estimate_windows(run, plan, mixture, level, done, threads):
            estimate.append(core)
            report(estimate.samples)
        return least_residual_gain(estimate.blocks(), mixture.blocks(), self.max_gain)

    def estimate_together(self, recordings: Sequence[tuple[Spool, Spool, Voice]]) -> None:
        """Append the estimates of mixtures, each with its estimate and voice, as far as it is faster than singly.

        On an accelerator, mixtures of similar length that fit a window go through the network together. Their samples
        may differ from those of `separate` by rounding. What fails or is left out here, `separate` does.
        """
        if not self.takes_batches:
            return
        plans = [make_plan(self.card.config, mixture.samples) for mixture, _, _ in recordings]
        lengths = {index: plan.samples for index, plan in enumerate(plans) if plan.count == 1}
        for group in by_length(lengths, self.sample_rate):
            if len(group) > 1:
                with contextlib.suppress(RuntimeError, OnevoiceError):  # out of memory has many names
                    self._estimate_batch([recordings[index] for index in group])

    @torch.inference_mode()
    def _estimate_batch(self, recordings: Sequence[tuple[Spool, Spool, Voice]]) -> None:
        """Append to each estimate all that the network makes of its mixture."""
        for _, _, voice in recordings:
            voice.require_model(self.model_hash)
        sounds = [torch.from_numpy(mixture.read(0, mixture.samples)) for mixture, _, _ in recordings]
        lengths = torch.tensor([len(sound) for sound in sounds])
        embeddings = torch.cat([voice.embedding for _, _, voice in recordings])
        audio, embeddings, lengths = (
            each.to(self.device) for each in (pad_sequence(sounds, batch_first=True), embeddings, lengths)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = self.model.extract(audio, embeddings, lengths)[0].float().cpu()
        for (_, estimate, _), row, sound in zip(recordings, found, sounds, strict=True):
            estimate.append(row[: len(sound)].numpy())

    @torch.inference_mode()
    def estimate(self, batch: Batch) -> Float[Tensor, "batch samples"]:
        """Return the network's first estimate for a padded batch, at the network's rate and level."""
        estimate: Tensor = self.model(to_network(batch, self.device))["predicted_audio"][0]
        return estimate.float().cpu()

    @torch.inference_mode()
    def _estimate_window(
        self, embedding: Float[Tensor, "1 speaker_dim"], sound: Float[Tensor, "1 samples"], level: Level | None
    ) -> Float[Tensor, "1 samples"]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model.extract(sound.to(self.device), embedding, level=level)[0].float().cpu()


def load(
    checkpoint: str | Path | None = None,
    config: ModelConfig | None = None,
    device: str = "auto",
    precision: str = "float32",
) -> Extractor:
    """Load weights by published name, path or hub address (`checkpoint.resolve`); None means the default weights.

    `config` describes the model of a `.pth` file; other files describe themselves. `precision` is float32, bfloat16 or
    auto, see `pick_precision`. Raises `CheckpointError`, and `ConfigError` for a device that is not available.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: {precision!r} is none; choose one of {', '.join(get_args(Precision))}")
    place = pick_device(device)
    return Extractor(*load_model(resolve(checkpoint), config, place), cast(Precision, precision))


def pick_precision(device: torch.device) -> Precision:
    """Return bfloat16 for a processor that multiplies in it, because it is faster then; float32 otherwise."""
    return "bfloat16" if device.type == "cpu" and has_bfloat16(device) else "float32"


def check_enrollment(samples: Mono, sample_rate: int, name: str) -> None:
    """Raise an `AudioError` that names `name` if the enrollment is too short or silent."""
    seconds = len(samples) / sample_rate
    if seconds < MIN_ENROLLMENT_SECONDS:
        raise AudioError(
            f"{name}: lasts {seconds:.2f} s; an enrollment needs at least {MIN_ENROLLMENT_SECONDS} s of the voice, "
            "and 3 s or more are better"
        )
    require_not_silent(samples, name)


def match_level(estimate: Mono, mixture: Mono, max_gain: float = math.inf) -> Mono:
    """Scale `estimate` by the gain within ±`max_gain` that leaves the least energy in `mixture − gain · estimate`."""
    return (least_residual_gain([estimate], [mixture], max_gain) * estimate.astype(np.float64)).astype(np.float32)


def at_rate(
    estimate: Spool,
    gain: float,
    from_rate: int,
    to_rate: int,
    samples: int,
    presence: Presence | None = None,
    absent_db: float = 0.0,
) -> Iterator[Mono]:
    """Yield an estimate with its gain, at another rate and exactly `samples` long, in blocks.

    With `presence`, it is turned down by `absent_db` where the voice is not heard.
    """

    def scaled() -> Iterator[Mono]:
        first = 0
        for block in estimate.blocks():
            wide = gain * block.astype(np.float64)
            if presence is not None and absent_db:
                wide *= presence.gains(first, first + len(block), from_rate, absent_db)
            yield wide.astype(np.float32)
            first += len(block)

    left = samples
    for block in resample_blocks(scaled(), from_rate, to_rate):
        if not left:
            return
        yield block[:left]
        left -= len(block[:left])
    if left:  # converting the rate back and forth may be off by a sample
        yield np.zeros(left, np.float32)
