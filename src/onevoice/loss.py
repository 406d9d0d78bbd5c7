"""The training loss of SpEx+: multi-scale SI-SDR with speaker classification (arXiv 2005.04686, eq. 6–8)."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from onevoice.config import STRICT
from onevoice.models.base import Lengths, Prediction, Wave, valid_mask

Weight = Annotated[float, Field(ge=0, le=1)]
UNKNOWN_SPEAKER = -1
"""The class index of a speaker that the classifier does not know; such items add no cross-entropy."""


class LossTerms(NamedTuple):
    """The loss and its parts, each a scalar tensor."""

    total: Float[Tensor, ""]
    si_sdr: Float[Tensor, ""]
    """Mean SI-SDR of the first estimate in dB; higher is better."""
    cross_entropy: Float[Tensor, ""]
    """Mean cross-entropy in nats over the items whose speaker is known; 0 where there is none."""


def si_sdr(estimate: Wave, target: Wave, length: Lengths | None = None, eps: float = 1e-8) -> Float[Tensor, " batch"]:
    """Return the SI-SDR of each item in dB, differentiable; higher is better.

    Both signals are centred over their valid samples and padding counts for nothing. `eps` bounds the value and
    its gradient: a silent target gives −10 log10 of the estimate's energy plus a constant, so that the loss then
    drives the estimate to silence; a perfect estimate gives a large finite value. Source: Le Roux et al., "SDR –
    half-baked or well done?", arXiv 1811.02508, eq. 3–5.
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
    return 10 * (torch.log10(signal_energy + eps) - torch.log10(error_energy + eps))


@dataclass(frozen=True, config=STRICT)
class MultiLoss:
    """−((1−alpha−beta) SI-SDR_short + alpha SI-SDR_middle + beta SI-SDR_long) + lambd · cross-entropy."""

    alpha: Weight = 0.1
    """Weight of the middle decoder's SI-SDR."""
    beta: Weight = 0.1
    """Weight of the long decoder's SI-SDR."""
    lambd: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the speaker classification."""

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
    ) -> LossTerms:
        """Return the loss of a batch. `speaker` holds class indices, `UNKNOWN_SPEAKER` where there is none."""
        scales = torch.stack([si_sdr(e, target, length).mean() for e in prediction["predicted_audio"]])
        weights = scales.new_tensor([1 - self.alpha - self.beta, self.alpha, self.beta])
        known = (speaker != UNKNOWN_SPEAKER).sum().clamp(min=1)
        cross_entropy = (
            F.cross_entropy(
                prediction["predicted_logits"].float(), speaker, ignore_index=UNKNOWN_SPEAKER, reduction="sum"
            )
            / known
        )
        return LossTerms(self.lambd * cross_entropy - (weights * scales).sum(), scales[0], cross_entropy)
