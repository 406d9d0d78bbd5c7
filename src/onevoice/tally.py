"""What the steps of a run leave to be reported: summed on the device, read when a log line is due."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onevoice.distributed import Group

MEANS = {
    "loss": "steps",
    "cross_entropy": "steps",
    "gradient_norm": "steps",
    "si_sdr_db": "speaking",
}
"""What is reported, and what its sum is divided by: steps, or the items whose target speaks."""
COLUMNS = (*MEANS, "steps", "speaking")


class Tally:
    """Sums over the finite steps since the last reading, and counts of the others."""

    def __init__(self, device: torch.device, group: Group) -> None:
        self.group = group
        self.sums = torch.zeros(len(COLUMNS), device=device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps skipped: in all, in a row up to now, and the most in a row since the last reading."""

    def add(self, finite: Bool[Tensor, ""], sums: dict[str, Float[Tensor, ""]]) -> None:
        """Take in one step; the host does not wait for it."""
        values = torch.stack([sums[name].detach().float() for name in COLUMNS])
        self.sums += torch.where(finite, values, 0.0)
        total, row, most = self.skipped
        row = torch.where(finite, 0, row + 1)
        self.skipped = torch.stack([total + ~finite, row, torch.maximum(most, row)])

    def take(self) -> dict[str, float]:
        """Return the sums, averaged over the processes of the group, and begin anew."""
        sums = self.group.mean(self.sums).tolist()
        self.sums.zero_()
        return dict(zip(COLUMNS, sums, strict=True))

    def read_skipped(self) -> tuple[int, int, int]:
        """Return how many steps were skipped: in all, in a row up to now, and the most in a row since last asked."""
        total, row, most = self.skipped.tolist()
        self.skipped[2] = 0
        return total, row, most

    def set_skipped(self, total: int, row: int) -> None:
        """Begin from counts of an earlier process."""
        self.skipped.copy_(torch.tensor([total, row, 0]))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Return the reported means; what nothing was counted for is left out."""
    return {name: sums[name] / sums[by] for name, by in MEANS.items() if sums.get(by)}
