"""The training loss of SpEx+: multi-scale SI-SDR with speaker classification (arXiv 2005.04686, eq. 6–8)."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from onevoice.config import STRICT
from onevoice.models.base import Lengths, Prediction, Wave, valid_mask, zero_padding

Weight = Annotated[float, Field(ge=0, le=1)]
UNKNOWN_SPEAKER = -1
"""The class index of a speaker that the classifier does not know; such items add no cross-entropy."""


ABSENT_LIMIT_DB = 30.0
"""Suppression of an absent target's estimate beyond which nothing is gained."""


class LossTerms(NamedTuple):
    """The loss and its parts, each a scalar tensor."""

    total: Float[Tensor, ""]
    si_sdr: Float[Tensor, ""]
    """Mean SI-SDR of the first estimate in dB over the items whose target speaks; higher is better."""
    cross_entropy: Float[Tensor, ""]
    """Mean cross-entropy in nats over the items whose speaker is known; 0 where there is none."""


def si_sdr(
    estimate: Wave, target: Wave, length: Lengths | None = None, limit_db: float | None = None, eps: float = 1e-8
) -> Float[Tensor, " batch"]:
    """Return the SI-SDR of each item in dB, differentiable; higher is better.

    Both signals are centred over their valid samples and padding counts for nothing. `limit_db` is the value that a
    perfect estimate approaches (as in Wisdom et al., arXiv 2006.12701, eq. 2), and `eps` keeps silence finite.
    Source: Le Roux et al., "SDR – half-baked or well done?", arXiv 1811.02508, eq. 3–5.
    """
    estimate, target = estimate.float(), target.float()
    valid = valid_mask(target.shape[1], length, target)
    count = target.shape[1] if valid is None else valid.sum(1, keepdim=True)

    def centred(signal: Tensor) -> Tensor:
        signal = signal if valid is None else signal * valid
        signal = signal - signal.sum(1, keepdim=True) / count
        return signal if valid is None else signal * valid

    estimate, target = centred(estimate), centred(target)
    scale = (estimate * target).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + eps)
    projection = scale * target
    signal_energy = projection.square().sum(1)
    error_energy = (estimate - projection).square().sum(1)
    if limit_db is not None:
        error_energy = error_energy + 10 ** (-limit_db / 10) * signal_energy
    return 10 * (torch.log10(signal_energy + eps) - torch.log10(error_energy + eps))


def suppression(
    estimate: Wave, mixture: Wave, length: Lengths | None = None, limit_db: float = ABSENT_LIMIT_DB
) -> Float[Tensor, " batch"]:
    """Return how far each estimate lies below its mixture in dB, up to `limit_db`; for items without their target.

    −10 log10(|e|² / |x|² + 10^(−limit_db / 10)): the energy of what should be silent, bounded, so that it cannot
    outweigh the items whose target speaks.
    """
    estimate, mixture = zero_padding(estimate.float(), length), zero_padding(mixture.float(), length)
    ratio = estimate.square().sum(1) / mixture.square().sum(1).clamp(min=1e-8)
    return -10 * torch.log10(ratio + 10 ** (-limit_db / 10))


def level_error(
    estimate: Wave, target: Wave, length: Lengths | None = None, eps: float = 1e-8
) -> Float[Tensor, " batch"]:
    """Return the distance in dB between the energies of each estimate and its target, |10 log10(|e|² / |s|²)|."""
    energies = [zero_padding(signal.float(), length).square().sum(1) + eps for signal in (estimate, target)]
    return (10 * torch.log10(energies[0] / energies[1])).abs()


@dataclass(frozen=True, config=STRICT)
class MultiLoss:
    """−((1−alpha−beta) SI-SDR_short + alpha SI-SDR_middle + beta SI-SDR_long) + lambd · cross-entropy.

    Where the target is silent, `suppression` stands in for the SI-SDR of each scale. From each present item's SI-SDR,
    `level` times its `level_error` is taken off.
    """

    alpha: Weight = 0.1
    """Weight of the middle decoder's SI-SDR."""
    beta: Weight = 0.1
    """Weight of the long decoder's SI-SDR."""
    lambd: NonNegativeFloat = 0.5
    """Weight of the speaker classification."""
    limit_db: PositiveFloat | None = None
    """SI-SDR that no item can pass, softly; needed where mixtures are the target alone. Null is the paper's loss."""
    level: NonNegativeFloat = 0.0
    """Weight of the level. SI-SDR leaves the level of estimates open, and without one the silence that is asked for
    where the target is absent is had by turning everything down."""

    def __post_init__(self) -> None:
        """Check that the short decoder keeps some weight."""
        if self.alpha + self.beta >= 1:
            raise ValueError(f"alpha + beta must be below 1, not {self.alpha + self.beta:g}")

    def __call__(
        self,
        prediction: Prediction,
        target: Wave,
        speaker: Int[Tensor, " batch"],
        length: Lengths | None = None,
        mixture: Wave | None = None,
    ) -> LossTerms:
        """Return the loss of a batch. `speaker` holds class indices, `UNKNOWN_SPEAKER` where there is none.

        `mixture` is needed only for items without their target; they add nothing where it is not given.
        """
        present = target.abs().amax(1) > 0
        estimates = prediction["predicted_audio"]
        ratios = [si_sdr(estimate, target, length, self.limit_db) for estimate in estimates]
        weights, gain = (1 - self.alpha - self.beta, self.alpha, self.beta), target.new_zeros(())
        for weight, estimate, ratio in zip(weights, estimates, ratios, strict=True):
            absent = target.new_zeros(len(target)) if mixture is None else suppression(estimate, mixture, length)
            speaking = ratio - self.level * level_error(estimate, target, length) if self.level else ratio
            gain = gain + weight * torch.where(present, speaking, absent).mean()
        known = (speaker != UNKNOWN_SPEAKER).sum().clamp(min=1)
        cross_entropy = (
            F.cross_entropy(
                prediction["predicted_logits"].float(), speaker, ignore_index=UNKNOWN_SPEAKER, reduction="sum"
            )
            / known
        )
        mean_si_sdr = (ratios[0] * present).sum() / present.sum().clamp(min=1)
        return LossTerms(self.lambd * cross_entropy - gain, mean_si_sdr, cross_entropy)
