"""The band-split network: exact windows, bounded context, and the compiled form against the layers."""

import functools

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onevoice.config import from_dict
from onevoice.errors import ConfigError
from onevoice.models import BandSplitConfig, BandSplitExtractor, bandsplit
from onevoice.models.bandsplit import Attention

CONFIG = BandSplitConfig(
    sample_rate=8000, bands=((4, 8), (3, 32)), channels=8, hidden=12, shared=4, blocks=3, dilations=(1, 2),
    attention_seconds=0.08, heads=2, key_dim=4, voice_frames=3, num_classes=5, normalize_level=False,
)  # fmt: skip


def network(config: BandSplitConfig = CONFIG) -> BandSplitExtractor:
    torch.manual_seed(0)
    model = BandSplitExtractor(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 23])
@torch.no_grad()
def test_attention_against_one_softmax_over_all_pairs(count: int) -> None:
    """Written out for every pair of frames, with minus infinity out of reach."""
    torch.manual_seed(0)
    attention = Attention(CONFIG).double()
    assert attention.reach == 5
    frames, voice = noise(2, count, CONFIG.features), noise(2, 3, CONFIG.features, seed=2)
    voice_keys = attention.queries_and_keys(voice).chunk(2, dim=2)[1]
    heads, size = CONFIG.heads, CONFIG.features // CONFIG.heads
    queries, keys = attention.queries_and_keys(frames).chunk(2, dim=2)
    results = []
    for head in range(heads):
        of_keys = slice(head * CONFIG.key_dim, (head + 1) * CONFIG.key_dim)
        of_values = slice(head * size, (head + 1) * size)
        scores = queries[..., of_keys] @ keys[..., of_keys].transpose(1, 2) / CONFIG.key_dim**0.5
        far = (torch.arange(count)[:, None] - torch.arange(count)).abs() > attention.reach
        scores = scores.masked_fill(far, -torch.inf)
        to_voice = queries[..., of_keys] @ voice_keys[..., of_keys].transpose(1, 2)
        weights = torch.cat([to_voice / CONFIG.key_dim**0.5, scores], dim=2).softmax(2)
        values = torch.cat([voice[..., of_values], frames[..., of_values]], dim=1)
        results.append(weights @ values)
    wanted = F.linear(torch.cat(results, dim=2), attention.project.weight, attention.project.bias)
    assert torch.allclose(attention(frames, voice, None), wanted, atol=1e-12)


@torch.no_grad()
def test_the_voice_is_picked_evenly_from_the_valid_frames() -> None:
    """A network that joins nothing but the frame's number: three of ten frames, at 1/6, 3/6 and 5/6 of them."""
    model = network()
    ref = noise(1, 9 * CONFIG.hop)
    frames = model._compress(model._spectrum(ref)).shape[1]
    assert frames == 10
    numbers = torch.arange(10.0, dtype=torch.float64)[None, :, None, None].expand(1, 10, 7, 8)
    model.full_blocks[0].forward = lambda inputs, voice, valid: inputs  # type: ignore[method-assign]
    model.time_blocks[1].forward = lambda inputs, film, valid: numbers  # type: ignore[method-assign]
    model.full_blocks[1].join = lambda inputs: inputs[:, :, 0, :1].expand(1, 10, CONFIG.features)  # type: ignore[method-assign]
    voice = model._embed(ref, None)[0, model.classifier.in_features :].reshape(3, CONFIG.features)
    assert voice[:, 0].tolist() == [1, 5, 8]


def test_compiled_gradients_equal_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code generator is torch's own; what can go wrong here is what it is given."""
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
    for plain, compiled in zip(*gradients, strict=True):
        assert (plain - compiled).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": 4}, "taps must be odd"),
        ({"bands": [[40, 4]]}, "cover 160 bins"),
        ({"heads": 3}, "heads must divide"),
        ({"attention_every": 7}, "attention_every must be at most blocks = 6"),
        ({"window_seconds": 0.0321}, "even number of samples"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(BandSplitConfig, {"sample_rate": 8000, "bands": [[32, 4]], **change})
