"""The Muon optimizer: every matrix moves by the nearest orthogonal matrix to the running mean of its gradient.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. `torch.optim.Muon` gives the
same updates; it came with torch 2.9, always computes in bfloat16, and takes the matrices one by one.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from onevoice.models.base import has_bfloat16

POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Factors of X, (X Xᵀ) X and (X Xᵀ)² X; each turn brings all singular values of X nearer to 1, small ones fastest."""
TURNS = 5
UPDATE_SIZE = 0.2
"""Root mean square of an update at a rate of 1: about that of AdamW (arXiv 2502.16982), so one rate serves both."""


class Muon(Optimizer):
    """Muon with Nesterov's momentum, for parameters that are matrices; those of one shape are computed together."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = orthogonalize(
                    torch.stack([self._momentum(each, group["momentum"]) for each in parameters])
                )
                size = group["lr"] * UPDATE_SIZE * max(shape) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """Take the gradient of a parameter into its running mean, and return the mean as of the next step."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - decay)
        return gradient.lerp(mean, decay)


def orthogonalize(matrices: Float[Tensor, "count rows columns"]) -> Float[Tensor, "count rows columns"]:
    """Return matrices with the same singular vectors, and singular values between about 0.7 and 1.2.

    Computed in bfloat16 where the processor multiplies in it, otherwise in float32.
    """
    precision = torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = (matrices.mT if is_tall else matrices).to(precision)
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp_min(1e-7)
    first, third, fifth = POLYNOMIAL
    for _ in range(TURNS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return (found.mT if is_tall else found).to(matrices.dtype)
