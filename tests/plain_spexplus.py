"""A second SpEx+, straight from the equations of arXiv 2005.04686, as functions of a weight dictionary.

It shares no code with the package, only the names of the weights. Every layer is the sum that the paper states, on
full-length inputs, one item at a time, in float64, in evaluation mode (running statistics in the batch norms).
"""

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def conv(signal: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """1-D correlation, no padding: (in, time) → (out, frames)."""
    window = weight.shape[2]
    count = (signal.shape[1] - window) // stride + 1
    frames = torch.stack([signal[:, t * stride : t * stride + window] for t in range(count)], dim=2)  # (in, w, T)
    out = torch.einsum("oiw,iwt->ot", weight, frames)
    return out if bias is None else out + bias[:, None]


def deconv(frames: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Transposed convolution to one channel: each frame adds its window at t·stride."""
    window = weight.shape[1]
    out = torch.zeros((frames.shape[1] - 1) * stride + window, dtype=frames.dtype)
    for t in range(frames.shape[1]):
        out[t * stride : t * stride + window] += frames[:, t] @ weight
    return out + bias


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x)) + slope * torch.minimum(x, torch.zeros_like(x))


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(0)
    variance = ((x - mean) ** 2).mean(0)
    return weight[:, None] * (x - mean) / torch.sqrt(variance + 1e-5) + bias[:, None]


def global_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return weight[:, None] * (x - mean) / torch.sqrt(variance + eps) + bias[:, None]


def batch_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    scaled = (x - w[f"{name}.running_mean"][:, None]) / torch.sqrt(w[f"{name}.running_var"][:, None] + 1e-5)
    return w[f"{name}.weight"][:, None] * scaled + w[f"{name}.bias"][:, None]


def max_pool(x: Tensor) -> Tensor:
    return torch.stack([x[:, 3 * t : 3 * t + 3].amax(1) for t in range(x.shape[1] // 3)], dim=1)


def encode(signal: Tensor, w: Weights, windows: tuple[int, ...], hop: int) -> list[Tensor]:
    """Return the three encoded signals. The long windows see zeros beyond the end; the length fits the short window."""
    count = (len(signal) - windows[0]) // hop + 1
    scales = []
    for index, window in enumerate(windows):
        padded = torch.cat([signal, torch.zeros(window, dtype=signal.dtype)])[None, : (count - 1) * hop + window]
        weight, bias = w[f"encoder.scales.{index}.weight"], w[f"encoder.scales.{index}.bias"]
        scales.append(torch.relu(conv(padded, weight, bias, hop)))
    return scales


def residual_block(x: Tensor, w: Weights, name: str) -> Tensor:
    y = prelu(batch_norm(conv(x, w[f"{name}.conv1.weight"], None), w, f"{name}.norm1"), w[f"{name}.prelu1.weight"])
    y = batch_norm(conv(y, w[f"{name}.conv2.weight"], None), w, f"{name}.norm2")
    skip = conv(x, w[f"{name}.skip.weight"], None) if f"{name}.skip.weight" in w else x
    return max_pool(prelu(y + skip, w[f"{name}.prelu2.weight"]))


def speaker_embedding(ref: Tensor, w: Weights, windows: tuple[int, ...], hop: int, groups: int = 1) -> Tensor:
    y = channel_norm(
        torch.cat(encode(ref, w, windows, hop)), w["speaker_encoder.norm.weight"], w["speaker_encoder.norm.bias"]
    )
    y = conv(y, w["speaker_encoder.expand.weight"], w["speaker_encoder.expand.bias"])
    for index in range(3):
        y = residual_block(y, w, f"speaker_encoder.blocks.{index}")
    y = conv(y, w["speaker_encoder.project.weight"], w["speaker_encoder.project.bias"])
    return y[:, : y.shape[1] // groups * groups].mean(1)


def temporal_block(x: Tensor, w: Weights, name: str, dilation: int, embedding: Tensor | None, eps: float) -> Tensor:
    y = x if embedding is None else torch.cat([x, embedding[:, None].expand(-1, x.shape[1])])
    y = prelu(conv(y, w[f"{name}.expand.weight"], w[f"{name}.expand.bias"]), w[f"{name}.expand_prelu.weight"])
    y = global_norm(y, w[f"{name}.expand_norm.weight"], w[f"{name}.expand_norm.bias"], eps)
    taps = w[f"{name}.depthwise.weight"][:, 0]
    reach = dilation * (taps.shape[1] - 1) // 2
    padded = torch.cat([torch.zeros(len(y), reach, dtype=y.dtype), y, torch.zeros(len(y), reach, dtype=y.dtype)], 1)
    z = sum(taps[:, k : k + 1] * padded[:, k * dilation : k * dilation + y.shape[1]] for k in range(taps.shape[1]))
    z = prelu(z + w[f"{name}.depthwise.bias"][:, None], w[f"{name}.depthwise_prelu.weight"])
    z = global_norm(z, w[f"{name}.depthwise_norm.weight"], w[f"{name}.depthwise_norm.bias"], eps)
    return x + conv(z, w[f"{name}.project.weight"], w[f"{name}.project.bias"])


def spexplus(
    mixture: Tensor,
    ref: Tensor,
    weights: Weights,
    windows: tuple[int, ...],
    blocks: int,
    stacks: int,
    original: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return the three estimates and the speaker logits of one mixture `(samples,)` and enrollment.

    The original system differs: gLN eps 1e-7, speaker frames averaged in threes, and zeros after the last frame.
    """
    eps = 1e-7 if original else 1e-5
    w = {name: value.double() for name, value in weights.items()}
    mixture, ref, hop = mixture.double(), ref.double(), windows[0] // 2
    embedding = speaker_embedding(ref, w, windows, hop, groups=3 if original else 1)
    scales = encode(mixture, w, windows, hop)
    y = conv(
        channel_norm(torch.cat(scales), w["norm.weight"], w["norm.bias"]), w["bottleneck.weight"], w["bottleneck.bias"]
    )
    for stack in range(stacks):
        for block in range(blocks):
            name = f"temporal_blocks.{stack * blocks + block}"
            y = temporal_block(y, w, name, 2**block, embedding if block == 0 else None, eps)
    estimates = []
    for index in range(3):
        mask = torch.relu(conv(y, w[f"masks.{index}.weight"], w[f"masks.{index}.bias"]))
        decoded = deconv(mask * scales[index], w[f"decoders.{index}.weight"], w[f"decoders.{index}.bias"], hop)
        estimates.append(torch.cat([decoded, decoded.new_zeros(len(mixture))])[: len(mixture)])
    return estimates, w["classifier.weight"] @ embedding + w["classifier.bias"]
