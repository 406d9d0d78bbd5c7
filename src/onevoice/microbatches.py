"""Batches in parts: for a step whose activations do not fit into memory at once."""

from typing import Any, cast

from onevoice.dataset import TrialBatch


def split(batch: TrialBatch, parts: int) -> list[TrialBatch]:
    """Return a batch in `parts` parts of equal size, in order; fewer where it has fewer items."""
    items = len(batch["name"])
    size = -(-items // parts)
    content = cast(dict[str, Any], batch)
    return [
        cast(TrialBatch, {key: value[start : start + size] for key, value in content.items()})
        for start in range(0, items, size)
    ]
