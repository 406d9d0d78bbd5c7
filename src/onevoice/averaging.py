"""Means of weights: over the steps of a run, and over checkpoints."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from onevoice.checkpoint import Card, State, load_checkpoint, provenance
from onevoice.errors import CheckpointError
from onevoice.models import Network


class RunningAverage:
    """An exponential moving average of a network's weights, kept as a network of its own.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so that the first, random weights are soon
    forgotten. Running statistics are averaged like weights: to first order, the statistics of the mean weights are
    the mean of the statistics. Counters are copied. Nothing here makes the host wait for the device.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: Network, finite: Bool[Tensor, ""]) -> None:
        """Move towards the weights of `model`, unless `finite` is False."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        share = torch.where(finite, 1 - decay, 0.0)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        means = [mean for mean, _ in pairs if mean.is_floating_point()]
        moves = torch._foreach_sub([now for _, now in pairs if now.is_floating_point()], means)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(means, moves)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
        self.updates += finite

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved average."""
        self.updates.copy_(state["updates"])
        self.model.load_state_dict(state["model"])


def average_checkpoints(paths: Sequence[str | Path]) -> tuple[State, Card]:
    """Return the mean of the weights of checkpoints of one model, each weighing the same, and a card that lists them.

    Sums are taken in float64. Counters are those of the first. Raises `CheckpointError` for unequal configs or
    training speakers.
    """
    if len(paths) < 2:
        raise CheckpointError(
            "an average needs two checkpoints or more: onevoice average OUT A.safetensors B.safetensors"
        )
    first, card = load_checkpoint(paths[0])
    sums = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    sources = [_source(paths[0], card)]
    for path in paths[1:]:
        state, other = load_checkpoint(path)
        if (other.config, other.speakers) != (card.config, card.speakers):
            what = "another config" if other.config != card.config else "other training speakers"
            raise CheckpointError(f"{path}: has {what} than {paths[0]}; average checkpoints of one run")
        for name, total in sums.items():
            total += state[name]
        sources.append(_source(path, other))
    means = {name: (total / len(paths)).to(first[name].dtype) for name, total in sums.items()}
    return {**first, **means}, Card(card.config, card.speakers, {"average_of": sources, **provenance()})


def _source(path: str | Path, card: Card) -> dict[str, Any]:
    return {"file": Path(path).name, "experiment": card.facts.get("experiment"), "step": card.facts.get("step")}
