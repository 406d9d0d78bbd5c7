"""SpEx+ written with torch's own layers in the obvious way: the baseline of the speed benchmarks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models import SpExPlusConfig


class Gln(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels, 1)), nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)
        variance = ((x - mean) ** 2).mean((1, 2), keepdim=True)
        return self.gamma * (x - mean) / torch.sqrt(variance + 1e-5) + self.beta


class Cln(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, channels: int, extra: int, hidden: int, taps: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels + extra, hidden, 1),
            nn.PReLU(),
            Gln(hidden),
            nn.Conv1d(hidden, hidden, taps, padding=dilation * (taps - 1) // 2, dilation=dilation, groups=hidden),
            nn.PReLU(),
            Gln(hidden),
            nn.Conv1d(hidden, channels, 1),
        )

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        if embedding is None:
            return x + self.layers(x)
        return x + self.layers(torch.cat([x, embedding[:, :, None].expand(-1, -1, x.shape[2])], dim=1))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(inputs, outputs, 1, bias=False),
            nn.BatchNorm1d(outputs),
            nn.PReLU(),
            nn.Conv1d(outputs, outputs, 1, bias=False),
            nn.BatchNorm1d(outputs),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1, bias=False)
        self.end = nn.Sequential(nn.PReLU(), nn.MaxPool1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers(x) + self.skip(x))


class PlainSpExPlus(nn.Module):
    """The published network of a config; it ignores lengths and levels."""

    def __init__(self, c: SpExPlusConfig) -> None:
        super().__init__()
        self.windows, self.hop, total = c.windows, c.hop, 3 * c.filters
        self.encoders = nn.ModuleList(nn.Conv1d(1, c.filters, w, stride=c.hop) for w in c.windows)
        self.first = nn.Sequential(Cln(total), nn.Conv1d(total, c.channels, 1))
        self.blocks = nn.ModuleList(
            Block(c.channels, 0 if b else c.speaker_dim, c.hidden, c.kernel_size, 2**b)
            for _ in range(c.stacks)
            for b in range(c.blocks)
        )
        self.per_stack = c.blocks
        self.masks = nn.ModuleList(nn.Conv1d(c.channels, c.filters, 1) for _ in c.windows)
        self.decoders = nn.ModuleList(nn.ConvTranspose1d(c.filters, 1, w, stride=c.hop) for w in c.windows)
        self.speaker = nn.Sequential(
            Cln(total),
            nn.Conv1d(total, c.channels, 1),
            Residual(c.channels, c.channels),
            Residual(c.channels, c.hidden),
            Residual(c.hidden, c.hidden),
            nn.Conv1d(c.hidden, c.speaker_dim, 1),
        )
        self.classifier = nn.Linear(c.speaker_dim, c.num_classes)

    def encode(self, audio: Tensor) -> list[Tensor]:
        count = (audio.shape[1] - self.windows[0]) // self.hop + 1
        sizes = [(count - 1) * self.hop + window for window in self.windows]
        return [
            F.relu(encoder(F.pad(audio, (0, max(0, size - audio.shape[1])))[:, None, :size]))
            for encoder, size in zip(self.encoders, sizes, strict=True)
        ]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, object]:
        audio, embedding = batch["audio"], self.speaker(torch.cat(self.encode(batch["ref"]), 1)).mean(2)
        scales = self.encode(audio)
        x = self.first(torch.cat(scales, 1))
        for index, block in enumerate(self.blocks):
            x = block(x, None if index % self.per_stack else embedding)
        estimates = [
            decode(scale * F.relu(mask(x)))[:, 0, : audio.shape[1]]
            for scale, mask, decode in zip(scales, self.masks, self.decoders, strict=True)
        ]
        return {"predicted_audio": tuple(estimates), "predicted_logits": self.classifier(embedding)}
