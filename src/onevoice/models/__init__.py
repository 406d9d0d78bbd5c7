"""Networks: batches in, estimates out; they know nothing of data.

`MODELS` is the zoo: the name in a config → (its config, its network).
"""

from onevoice.models.base import Batch, Network, NetworkConfig, Prediction, to_network
from onevoice.models.spexplus import SpExPlus, SpExPlusConfig

ModelConfig = SpExPlusConfig
"""The config of any network of the zoo."""

MODELS: dict[str, tuple[type[ModelConfig], type[Network]]] = {"spexplus": (SpExPlusConfig, SpExPlus)}


def build_model(config: ModelConfig) -> Network:
    """Build the network that `config` describes, with fresh weights drawn from torch's generator."""
    if isinstance(config, SpExPlusConfig):
        return SpExPlus(config)
    raise TypeError(f"not a model config: {config!r}")


__all__ = [
    "MODELS",
    "Batch",
    "ModelConfig",
    "Network",
    "NetworkConfig",
    "Prediction",
    "SpExPlus",
    "SpExPlusConfig",
    "build_model",
    "to_network",
]
