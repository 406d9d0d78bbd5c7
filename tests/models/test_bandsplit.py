"""The band-split network: exact windows, bounded context, and the compiled form against the layers."""

import functools
from dataclasses import replace

import jaxtyping
import pytest
import torch
from plain_layers import PlainBandSplit
from torch import Tensor
from torch.nn import functional as F

from onevoice.config import from_dict
from onevoice.errors import ConfigError
from onevoice.models import BandSplitConfig, BandSplitExtractor, bandsplit, bandsplit_blocks
from onevoice.models.bandsplit_blocks import Attention, TimeBlock
from onevoice.models.layers import by_convolution

CONFIG = BandSplitConfig(
    sample_rate=8000, bands=((4, 8), (3, 32)), channels=8, hidden=12, feed_forward=10, shared=4, blocks=3,
    dilations=(1, 2), taps=3, attention_seconds=0.08, heads=2, key_dim=3, voice_frames=3, num_classes=5,
    normalize_level=False,
)  # fmt: skip
CAUSAL = replace(CONFIG, causal=True, level_seconds=0.1)


def network(config: BandSplitConfig = CONFIG) -> BandSplitExtractor:
    torch.manual_seed(0)
    model = BandSplitExtractor(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def test_the_network_against_plain_layers() -> None:
    """With torch's own layers, written apart from the blocks: the baseline of the speed benchmarks."""
    model = network()
    audio, embedding = noise(2, 9 * CONFIG.hop + 5), model._embed(noise(2, 3000, seed=2), None)
    wanted = PlainBandSplit(model)(audio, embedding)
    assert torch.allclose(model._extract(audio, embedding, None)[0], wanted, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 127, 128, 129, 1000])
def test_the_spectrum_is_inverted_exactly(samples: int) -> None:
    model, audio = network(), noise(2, samples)
    assert torch.allclose(model._waveform(model._spectrum(audio), samples), audio, atol=1e-12)


def test_a_sample_depends_on_its_context_alone() -> None:
    """The gradient reaches the context, to its last frame, and not beyond."""
    model = network()
    context, middle = round(CONFIG.context_seconds * CONFIG.sample_rate), 9000
    audio = noise(1, 18_000).requires_grad_()
    (estimate,) = model.extract(audio, model.embed(noise(1, 4000, seed=2)))
    estimate[0, middle : middle + CONFIG.hop].sum().backward()
    assert audio.grad is not None
    (touched,) = audio.grad[0].nonzero(as_tuple=True)
    assert middle - context <= touched.min() < middle - context + 2 * CONFIG.window
    assert middle + context - CONFIG.window < touched.max() <= middle + CONFIG.hop + context


@torch.no_grad()
def test_windows_with_context_give_the_whole_recording() -> None:
    model, audio, hop = network(), noise(1, 24_000), CONFIG.hop
    voice = model.embed(noise(1, 4000, seed=2))
    (whole,) = model.extract(audio, voice)
    context = -(-round(CONFIG.context_seconds * CONFIG.sample_rate) // hop) * hop
    parts = []
    for first in range(0, audio.shape[1], 32 * hop):
        begin = max(0, first - context)
        (part,) = model.extract(audio[:, begin : first + 32 * hop + context], voice)
        parts.append(part[:, first - begin : first - begin + 32 * hop])
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


@pytest.mark.parametrize("at", [1, 3000, 8998])
def test_a_causal_network_depends_on_nothing_after_its_latency(at: int) -> None:
    model = network(CAUSAL)
    assert CAUSAL.latency_seconds is not None
    latency, context = (round(x * CAUSAL.sample_rate) for x in (CAUSAL.latency_seconds, CAUSAL.context_seconds))
    audio = noise(1, 9000).requires_grad_()
    (estimate,) = model.extract(audio, model.embed(noise(1, 4000, seed=2)))
    estimate[0, at].backward()
    assert audio.grad is not None
    (touched,) = audio.grad[0].nonzero(as_tuple=True)
    assert touched.max() < at + latency
    assert touched.max() >= min(at + latency - CAUSAL.hop - 1, 8998)  # the latency is not stated too large
    assert touched.min() >= at - context


@torch.no_grad()
def test_a_causal_network_follows_the_level_of_the_past() -> None:
    """A gain scales the estimate; what comes before the reach of the level does not matter."""
    model, voice = network(CAUSAL), network(CAUSAL).embed(noise(1, 4000, seed=2))
    audio = noise(1, 6000)
    (plain,), (loud,) = model.extract(audio, voice), model.extract(20 * audio, voice)
    assert torch.allclose(loud, 20 * plain, rtol=1e-4, atol=1e-3)
    assert not model.extract(0 * audio, voice)[0].any()
    power = model._spectrum(audio).abs().square()[0, :, : CAUSAL.bins].mean(1)
    frame = CAUSAL.level_frames + 3
    level = power[frame - CAUSAL.level_frames + 1 : frame + 1].mean() + 1e-8
    wanted = model._spectrum(audio)[0, frame, 5] / level.sqrt()
    compressed = torch.view_as_complex(model._compress(model._spectrum(audio)))[0, frame, 5]
    assert torch.allclose(compressed * compressed.abs(), wanted, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 23])
@torch.no_grad()
def test_attention_against_one_softmax_over_all_pairs(count: int, causal: bool) -> None:
    """Written out for every pair of frames and head, with minus infinity out of reach."""
    torch.manual_seed(0)
    attention = Attention(replace(CONFIG, causal=causal)).double()
    assert attention.reach == 5
    frames = noise(2, count, 7, 8)
    far = torch.arange(count)[:, None] - torch.arange(count)
    far = (far > 5) | (far < 0) if causal else far.abs() > 5
    assert torch.allclose(attention(frames, None, None), attend(attention, frames, frames, far), atol=1e-12)
    voice = noise(2, 3, 7, 8, seed=2)
    everywhere = torch.zeros(count, 3, dtype=torch.bool)
    assert torch.allclose(attention(frames, voice, None), attend(attention, frames, voice, everywhere), atol=1e-12)


def attend(attention: Attention, frames: Tensor, others: Tensor, far: Tensor) -> Tensor:
    normed, other = attention.norm(frames), attention.norm(others)
    found = torch.empty_like(frames)
    for head in range(CONFIG.heads):
        of_keys = slice(head * CONFIG.key_dim, (head + 1) * CONFIG.key_dim)
        of_values = slice(head * 4, (head + 1) * 4)
        queries = F.linear(normed, attention.queries.weight[of_keys], attention.queries.bias[of_keys])
        keys = F.linear(other, attention.keys.weight[of_keys])
        values = F.linear(other, attention.values.weight[of_values], attention.values.bias[of_values])
        scores = torch.einsum("bqkc,btkc->bqt", queries, keys) / (7 * CONFIG.key_dim) ** 0.5
        weights = scores.masked_fill(far, -torch.inf).softmax(2)
        found[..., of_values] = torch.einsum("bqt,btkc->bqkc", weights, values)
    return frames + F.linear(found, attention.project.weight, attention.project.bias)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_time_block_against_a_depthwise_convolution(causal: bool) -> None:
    torch.manual_seed(0)
    block = TimeBlock(replace(CONFIG, causal=causal, taps=5), dilation=2).double()
    frames, film = noise(2, 11, 7, 8), noise(2, 1, 7, 16, seed=3)
    normed = frames / (frames.square().mean(3, keepdim=True) + 1e-5).sqrt() * (1 + film[..., :8]) + film[..., 8:]
    value, gate = F.linear(normed, block.expand.weight, block.expand.bias).chunk(2, dim=3)
    inputs = (value * gate * gate.sigmoid()).permute(0, 2, 3, 1).reshape(14, 12, 11)
    padded = F.pad(inputs, (8, 0) if causal else (4, 4))
    convolved = F.conv1d(padded, block.taps.t()[:, None], dilation=2, groups=12)
    hidden = convolved.reshape(2, 7, 12, 11).permute(0, 3, 1, 2)
    wanted = frames + F.linear(hidden, block.project.weight, block.project.bias)
    assert torch.allclose(block(frames, film, None), wanted, atol=1e-12)


def test_faster_ways_without_gradients_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in place of products, halves of the gated products, and fused norms."""
    model = network().float()
    batch = {"audio": noise(2, 2000).float(), "ref": noise(2, 3000, seed=2).float()}
    wanted = model(batch)["predicted_audio"][0].detach()
    used: list[torch.Size] = []
    for many in (0, 2**30):
        monkeypatch.setattr(bandsplit_blocks, "MANY", many)
        monkeypatch.setattr(
            bandsplit_blocks, "by_convolution", lambda *given: used.append(given[1].shape) or by_convolution(*given)
        )
        with torch.no_grad():
            found = model(batch)["predicted_audio"][0]
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert bool(used) is (many == 0)
        used.clear()


@torch.no_grad()
def test_the_voice_is_the_mean_and_frames_picked_evenly() -> None:
    """A network that gives the number of each frame: three of ten frames, at 1/6, 3/6 and 5/6 of them."""
    model = network()
    ref = noise(1, 9 * CONFIG.hop)
    assert model._spectrum(ref).shape[1] == 10
    numbers = torch.arange(10.0, dtype=torch.float64)[None, :, None, None].expand(1, 10, 7, 8)
    model.voice_feed.forward = lambda inputs: numbers  # type: ignore[method-assign]
    model.voice_norm.forward = lambda inputs: 2 * inputs  # type: ignore[method-assign]
    embedding = model._embed(ref, None).reshape(4, 7, 8)
    assert (embedding[:, 2, 3] - torch.tensor([9, 1, 5, 8])).abs().max() < 1e-12
    assert torch.equal(model.split_embedding(embedding.flatten()[None])[1][0], embedding[1:])


def test_compiled_gradients_equal_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code generator is torch's own; what can go wrong here is what it is given."""
    from torch._dynamo.utils import counters  # here, because it loads much

    torch.compiler.reset()  # variants of other files count toward a limit
    graphs = counters["stats"]["unique_graphs"]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shapes are not checked inside compiled code
    compile_once = functools.cache(functools.partial(torch.compile, dynamic=False, backend="aot_eager"))
    monkeypatch.setattr(bandsplit, "compile_once", compile_once)
    model = network().float().train()
    batch = {"audio": noise(2, 2000).float(), "ref": noise(2, 3000, seed=2).float()}
    gradients = []
    for model.compiled in (False, True):
        model.zero_grad()
        prediction = model(batch)
        (prediction["predicted_audio"][0].square().sum() + prediction["predicted_logits"].square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert counters["stats"]["unique_graphs"] > graphs
    for plain, compiled in zip(*gradients, strict=True):
        assert (plain - compiled).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": 4}, "taps must be odd"),
        ({"bands": [[40, 4]]}, "cover 160 bins"),
        ({"heads": 5}, "heads must divide"),
        ({"blocks": 1}, "blocks: input should be greater than or equal to 2"),
        ({"causal": True}, "normalize_level must be false with causal"),
        ({"window_seconds": 0.0321}, "even number of samples"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(BandSplitConfig, {"sample_rate": 8000, "bands": [[32, 4]], **change})
