"""Recordings of similar length, to go through the network together: one alone does not fill an accelerator."""

from collections.abc import Mapping

GROUP = 32
"""The most recordings to hold at once."""
BATCH_SECONDS = 480.0
"""The most sound in a batch, with its padding; it bounds the memory."""
MAX_PADDING = 0.2
"""The largest share of padding in the shortest recording of a batch."""


def by_length(lengths: Mapping[int, int], sample_rate: int) -> list[list[int]]:
    """Return the keys of `lengths`, in samples at a rate in Hz, in groups for one batch each, the longest first."""
    groups: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        longest = lengths[groups[-1][0]] if groups else 0
        if (
            not groups
            or lengths[key] < (1 - MAX_PADDING) * longest
            or (len(groups[-1]) + 1) * longest > BATCH_SECONDS * sample_rate
        ):
            groups.append([])
        groups[-1].append(key)
    return groups
