"""A voice: the speaker embedding of one person by one network. One value serves any number of recordings."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onevoice.errors import CheckpointError


@dataclass(frozen=True)
class Voice:
    """The speaker embedding of one person."""

    embedding: Float[Tensor, "1 speaker_dim"]
    model_hash: str
    """Hash of the weights that made the embedding; other weights cannot use it."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Voice):
            return NotImplemented
        return self.model_hash == other.model_hash and torch.equal(self.embedding, other.embedding)

    def __hash__(self) -> int:
        return hash((self.model_hash, tuple(self.embedding[0].tolist())))

    def require_model(self, model_hash: str) -> None:
        """Raise `CheckpointError` if other weights made this voice."""
        if self.model_hash != model_hash:
            raise CheckpointError(
                f"the voice was made by other weights ({self.model_hash[:12]}…) than these ({model_hash[:12]}…); "
                "enroll it again, or use its weights"
            )
