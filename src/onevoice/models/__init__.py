"""Networks: a batch in, estimates of the target and speaker logits out. They know nothing of data or training.

To add a network, write one file and add its class to `NETWORKS` (docs/add_a_network.md).
"""

import functools
import operator
import warnings
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from onevoice.errors import ConfigError
from onevoice.models.bandsplit import BandSplitExtractor
from onevoice.models.bandsplit_blocks import BandSplitConfig
from onevoice.models.base import Batch, Network, NetworkConfig, Prediction, to_network
from onevoice.models.spexplus import SpExPlus, SpExPlusConfig

NETWORKS: tuple[type[Network], ...] = (SpExPlus, BandSplitExtractor)

MODELS: dict[str, type[Network]] = {network.config_class.name: network for network in NETWORKS}
"""Every network by the name in its config."""


def name(section: Any) -> str:
    """Return the name of the network that a config section describes; SpEx+ if it has none."""
    default = SpExPlusConfig.name
    return str(section.get("name", default) if isinstance(section, dict) else getattr(section, "name", default))


if TYPE_CHECKING:
    ModelConfig = NetworkConfig
else:
    ModelConfig = Annotated[
        functools.reduce(operator.or_, (Annotated[each.config_class, Tag(key)] for key, each in MODELS.items())),
        Discriminator(name),
    ]
    """The config of any of the networks; a config section selects one by its `name`."""


def build(config: ModelConfig) -> Network:
    """Return the network that a config describes, with random weights.

    Raises `ConfigError` for sizes that no memory can hold.
    """
    with warnings.catch_warnings():  # without training speakers, the classifier is empty
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        try:
            return MODELS[config.name](config)
        except (RuntimeError, MemoryError, TypeError) as error:
            if isinstance(error, TypeError) and "Overflow" not in str(error):
                raise
            reason = str(error).splitlines()[0][:150]
            raise ConfigError(f"model: cannot be built in these sizes ({reason})") from error


__all__ = [
    "MODELS",
    "NETWORKS",
    "BandSplitConfig",
    "BandSplitExtractor",
    "Batch",
    "ModelConfig",
    "Network",
    "NetworkConfig",
    "Prediction",
    "SpExPlus",
    "SpExPlusConfig",
    "build",
    "to_network",
]
