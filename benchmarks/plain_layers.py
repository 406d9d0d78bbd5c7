"""Our networks written with torch's own layers in the obvious way: the baseline of the speed benchmarks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models import SpExPlusConfig
from onevoice.models.bandsplit import BandSplitExtractor
from onevoice.models.bandsplit_blocks import Attention, FeedForward, FullBand, TimeBlock


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


class PlainBandSplit:
    """A band-split network that hears whole recordings, with the weights of `model`; it ignores lengths and levels."""

    def __init__(self, model: BandSplitExtractor) -> None:
        self.model, self.config = model, model.config

    def __call__(self, audio: Tensor, embedding: Tensor) -> Tensor:
        model, c = self.model, self.config
        window = torch.hann_window(c.window, dtype=audio.dtype).sqrt()
        padded = F.pad(audio, (0, -audio.shape[1] % c.hop))
        spectrum = (
            torch.stft(padded, c.window, c.hop, window=window, pad_mode="constant", return_complex=True) / c.hop**0.5
        )
        bins = spectrum[:, : c.bins]
        compressed = torch.view_as_real(bins * (bins.abs().square() + 1e-8) ** -0.25).transpose(1, 2)
        groups, first = [], 0
        for (count, width), weight in zip(c.bands, model.split.weights, strict=True):
            for band in range(count):
                groups.append(compressed[:, :, first : first + width].flatten(2) @ weight[band])
                first += width
        x = torch.stack(groups, dim=2)
        frames = embedding.reshape(len(embedding), -1, c.band_count, c.channels)
        for index in range(c.blocks):
            film = F.linear(frames[:, :1], model.film[index].weight, model.film[index].bias)
            x = self.time(model.time[index], x, film)
            x = self.full(model.full[index], x)
            if c.attends(index):
                x = self.attend(model.attention[str(index)], x, None)
            x = self.feed(model.feed[index], x)
            if index == 1:
                x = self.attend(model.voice_attention, x, frames[:, 1:])
        x, masks, band = self.norm(model.mask.norm, x), [], 0
        for (count, _), weight in zip(c.bands, model.mask.weights, strict=True):
            for each in range(count):
                masks.append(x[:, :, band] @ weight[each])
                band += 1
        mask = torch.view_as_complex((torch.cat(masks, 2) + model.mask.bias).unflatten(2, (-1, 2))).transpose(1, 2)
        masked = F.pad(bins * mask, (0, 0, 0, spectrum.shape[1] - c.bins)) * c.hop**0.5
        return torch.istft(masked, c.window, c.hop, window=window, length=audio.shape[1])

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, 1e-5)

    def time(self, block: TimeBlock, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, dim=3)
        inputs = self.norm(block.norm, x) * (1 + scale) + shift
        value, gate = F.linear(inputs, block.expand.weight, block.expand.bias).chunk(2, dim=3)
        sequences = (value * F.silu(gate)).permute(0, 2, 3, 1).flatten(0, 1)
        taps, padding = block.taps.t()[:, None], block.reach // 2
        convolved = F.conv1d(sequences, taps, padding=padding, dilation=block.dilation, groups=len(taps))
        convolved = convolved.unflatten(0, (len(x), -1)).permute(0, 3, 1, 2)
        return x + F.linear(convolved, block.project.weight, block.project.bias)

    def full(self, layer: FullBand, x: Tensor) -> Tensor:
        joined = F.silu(F.linear(self.norm(layer.norm, x), layer.gather.weight, layer.gather.bias)).flatten(2)
        mixed = F.relu(F.linear(joined, layer.mix.weight, layer.mix.bias)).unflatten(2, (x.shape[2], -1))
        return x + F.linear(mixed, layer.spread.weight, layer.spread.bias)

    def feed(self, layer: FeedForward, x: Tensor) -> Tensor:
        value, gate = F.linear(self.norm(layer.norm, x), layer.expand.weight, layer.expand.bias).chunk(2, dim=3)
        return x + F.linear(value * F.silu(gate), layer.project.weight, layer.project.bias)

    def attend(self, layer: Attention, x: Tensor, voice: Tensor | None) -> Tensor:
        def heads(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(frames, weight, bias).unflatten(3, (layer.heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)

        normed = self.norm(layer.norm, x)
        others = normed if voice is None else self.norm(layer.norm, voice)
        times = torch.arange(x.shape[1])
        near = None if voice is not None else (times[:, None] - times).abs() <= layer.reach
        found = F.scaled_dot_product_attention(
            heads(normed, layer.queries.weight, layer.queries.bias),
            heads(others, layer.keys.weight, None),
            heads(others, layer.values.weight, layer.values.bias),
            near,
        )
        found = found.unflatten(3, (x.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(3)
        return x + F.linear(found, layer.project.weight, layer.project.bias)
