"""Checkpoints of the original system, https://github.com/ir4kgl/ss_dla: their names for the layers of SpEx+.

Such a file is a pickled dict with `arch`, `epoch`, `state_dict`, `optimizer`, `monitor_best` and `config`. Its network
is SpEx+ with gLN eps 1e-7, without level normalization, and without partial frames (`ORIGINAL_MODEL`). Every parameter
here has one there, with the same values in the same order, so weights and Adam's moments convert exactly.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onevoice.errors import CheckpointError
from onevoice.models import SpExPlusConfig

ORIGINAL_MODEL: dict[str, Any] = {"normalize_level": False, "norm_eps": 1e-7, "whole_frames": True}
"""What sets the network of the original system apart from the defaults of SpEx+."""
SAMPLE_RATE = 16_000
ENCODERS = ("short_encoder", "middle_encoder", "long_encoder")
RESIDUAL_BLOCK = {
    "conv1": "first_layers.0",
    "norm1": "first_layers.1",
    "prelu1": "first_layers.2",
    "conv2": "first_layers.3",
    "norm2": "first_layers.4",
    "prelu2": "last_layers.0",
    "skip": "last_conv",
}
TEMPORAL_BLOCK = (
    "expand",
    "expand_prelu",
    "expand_norm",
    "depthwise",
    "depthwise_prelu",
    "depthwise_norm",
    "project",
)
"""The layers of a temporal block in the order of their numbers there."""
KINDS = {"gamma": "weight", "beta": "bias"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A checkpoint of the original system in the terms of this package."""

    config: SpExPlusConfig
    state: dict[str, Tensor]
    facts: dict[str, Any]
    epoch: int
    """Completed epochs."""
    optimizer: Any
    """The state of its optimizer as saved; `convert_moments` reads it."""
    parameters: tuple[str, ...]
    """Our names of the parameters, in the order in which its optimizer numbers them."""


def convert_checkpoint(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> OriginalCheckpoint | None:
    """Convert the content of a file and its weights, whose names have no `module.`; None for another network.

    Raises `CheckpointError` if some of the weights are missing or do not belong to the network.
    """
    if not any(name.startswith(("speech_encoder.", "speaker_extractor.", "speech_decoder.")) for name in state):
        return None
    stacks = _count(state, r"speaker_extractor\.tcn\.(\d+)\.")
    blocks = 1 + _count(state, r"speaker_extractor\.tcn\.0\.layers\.(\d+)\.")
    if stacks * blocks > len(state):
        raise CheckpointError("not a whole checkpoint of the original system: most of its temporal blocks are missing")
    names = {theirs: ours for ours, theirs in _layer_names(stacks, blocks)}
    ours = {theirs: _our_name(theirs, names) for theirs in state}
    unknown = [theirs for theirs, name in ours.items() if name is None]
    converted = {str(name): _convert(theirs, state[theirs]) for theirs, name in ours.items() if name is not None}
    missing = [f"{theirs}.weight" for theirs, name in names.items() if f"{name}.weight" not in converted]
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} does not belong to it"
        more = len(missing) + len(unknown) - 1
        raise CheckpointError(
            f"not a whole checkpoint of the original system: {problem}{f', and {more} more' if more else ''}"
        )
    epoch = content.get("epoch")
    return OriginalCheckpoint(
        _config(converted, stacks, blocks, _sample_rate(content.get("config"))),
        converted,
        {"source": "the original system, ir4kgl/ss_dla", "arch": str(content.get("arch")), "epoch": epoch},
        epoch if isinstance(epoch, int) else 0,
        content.get("optimizer"),
        tuple(str(ours[theirs]) for theirs in state if not theirs.endswith(BUFFERS)),
    )


def convert_moments(checkpoint: OriginalCheckpoint) -> dict[str, dict[str, Tensor]]:
    """Return what Adam keeps for each parameter, by our names: `step`, `exp_avg` and `exp_avg_sq`.

    Raises `CheckpointError` if the file does not hold exactly that.
    """
    saved, count = checkpoint.optimizer, len(checkpoint.parameters)
    moments = {}
    try:
        (group,) = saved["param_groups"]
        if list(group["params"]) != list(range(count)) or group.get("amsgrad"):
            raise CheckpointError("its optimizer does not hold the moments of Adam for every parameter")
        for number, name in enumerate(checkpoint.parameters):
            own, like = saved["state"][number], checkpoint.state[name]
            moments[name] = {
                "step": torch.tensor(float(own["step"])),
                **{key: own[key].reshape(like.shape) for key in ("exp_avg", "exp_avg_sq")},
            }
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError("its optimizer does not hold the moments of Adam for every parameter") from error
    return moments


def _layer_names(stacks: int, blocks: int) -> Iterator[tuple[str, str]]:
    """Yield every layer with parameters: its name here, and its name there."""
    for scale, encoder in enumerate(ENCODERS):
        yield f"encoder.scales.{scale}", f"speech_encoder.{encoder}"
        yield f"masks.{scale}", f"speaker_extractor.head{scale + 1}.0"
        yield f"decoders.{scale}", f"speech_decoder.decoder{scale + 1}"
    yield "speaker_encoder.norm", "speaker_encoder.layers.0"
    yield "speaker_encoder.expand", "speaker_encoder.layers.1"
    for block in range(3):
        for ours, theirs in RESIDUAL_BLOCK.items():
            if ours != "skip" or block == 1:  # the only block that changes the number of channels
                yield f"speaker_encoder.blocks.{block}.{ours}", f"speaker_encoder.layers.{block + 2}.{theirs}"
    yield "speaker_encoder.project", "speaker_encoder.layers.5"
    yield "classifier", "classificator.layers.0"
    yield "norm", "speaker_extractor.tail.0"
    yield "bottleneck", "speaker_extractor.tail.1"
    for stack in range(stacks):
        for block in range(blocks):
            theirs = f"speaker_extractor.tcn.{stack}." + (f"layers.{block - 1}" if block else "first")
            for number, ours in enumerate(TEMPORAL_BLOCK):
                yield f"temporal_blocks.{stack * blocks + block}.{ours}", f"{theirs}.layers.{number}"


def _our_name(theirs: str, names: Mapping[str, str]) -> str | None:
    layer, _, kind = theirs.rpartition(".")
    return f"{names[layer]}.{KINDS.get(kind, kind)}" if layer in names else None


def _convert(theirs: str, values: Tensor) -> Tensor:
    """Drop the axes of size 1 that our parameters do not have: after a global norm's, and inside a decoder's."""
    if theirs.endswith((".gamma", ".beta")) and values.ndim == 2:
        return values[:, 0]
    return values[:, 0] if re.fullmatch(r"speech_decoder\.decoder\d\.weight", theirs) and values.ndim == 3 else values


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the highest number that `pattern` finds in the names."""
    found = [re.match(pattern, name) for name in state]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _config(state: Mapping[str, Tensor], stacks: int, blocks: int, sample_rate: int) -> SpExPlusConfig:
    """Return the config whose sizes are those of the weights. Raises `CheckpointError` if there is none."""
    windows = [state[f"encoder.scales.{scale}.weight"].shape[-1] for scale in range(3)]
    taps = state["temporal_blocks.0.depthwise.weight"]
    try:
        return SpExPlusConfig(
            sample_rate=sample_rate,
            num_classes=len(state["classifier.weight"]),
            window_seconds=(windows[0] / sample_rate, windows[1] / sample_rate, windows[2] / sample_rate),
            filters=len(state["encoder.scales.0.weight"]),
            channels=len(state["bottleneck.weight"]),
            hidden=len(taps),
            kernel_size=taps.shape[-1],
            blocks=blocks,
            stacks=stacks,
            speaker_dim=len(state["speaker_encoder.project.weight"]),
            **ORIGINAL_MODEL,
        )
    except (ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"the sizes of its weights fit no SpEx+ ({error})") from error


def _sample_rate(config: Any) -> int:
    """Return the sample rate in a pickled config, which may be of any form; 16000 if it has none."""
    values = config if isinstance(config, dict) else getattr(config, "contents", None)
    for key in ("_config", "preprocessing", "sr"):
        values = values.get(key, values if key == "_config" else None) if isinstance(values, dict) else None
    return values if isinstance(values, int) and values > 0 else SAMPLE_RATE
