"""Memory for time: temporal blocks that are computed again in the backward pass instead of kept."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from onevoice.models import Network
from onevoice.models.layers import TemporalBlock


def checkpoint_blocks(model: Network) -> None:
    """Let every temporal block of `model` keep only its input for the backward pass (arXiv 1604.06174).

    Parameters, their names and the gradients stay as they are, bit for bit where the device's kernels are
    deterministic; memory for activations falls to a fraction, and a step takes about a third more arithmetic.
    """
    for block in model.modules():
        if isinstance(block, TemporalBlock):
            object.__setattr__(block, "forward", partial(_recomputed, block.forward))


def _recomputed(forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
