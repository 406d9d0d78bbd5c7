"""The promises of the model contract, for every network in the table, and SpEx+ against its equations."""

import copy
from typing import Any

import pytest
import torch
from plain_spexplus import spexplus
from pydantic.dataclasses import dataclass
from tiny import SMALL_CONFIGS
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.config import STRICT, from_dict, to_dict
from onevoice.errors import ConfigError
from onevoice.models import MODELS, ModelConfig, Network, SpExPlus, SpExPlusConfig, build
from onevoice.models.layers import GlobalNorm, SpeechDecoder, TemporalBlock, ValidBatchNorm


@dataclass(frozen=True, config=STRICT)
class Section:
    """A config with a network of any kind."""

    model: ModelConfig = SpExPlusConfig(blocks=3)


def network(name: str, seed: int = 0) -> Network:
    """A small network with no weight at a symmetric initial value."""
    torch.manual_seed(seed)
    model = MODELS[name](SMALL_CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Network:
    return network(request.param)


def test_every_network_has_a_small_config() -> None:
    assert SMALL_CONFIGS.keys() == MODELS.keys()


@pytest.mark.parametrize("samples", [1, 7, 20, 21, 159, 160, 1000, 1009])
@torch.no_grad()
def test_estimates_have_the_length_of_the_mixture(model: Network, samples: int) -> None:
    prediction = model({"audio": noise(2, samples), "ref": noise(2, 900)})
    assert {tuple(e.shape) for e in prediction["predicted_audio"]} == {(2, samples)}
    assert prediction["predicted_logits"].shape == (2, 5)
    assert all(e.isfinite().all() for e in prediction["predicted_audio"])


def test_every_parameter_gets_a_gradient(model: Network) -> None:
    model.train()
    prediction = model({"audio": noise(2, 800), "ref": noise(2, 900)})
    total = sum(e.square().sum() for e in prediction["predicted_audio"]) + prediction["predicted_logits"].square().sum()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_the_estimate_follows_the_enrollment(model: Network) -> None:
    mixture = noise(1, 800)
    first, second = (model({"audio": mixture, "ref": noise(1, 900, seed=s)})["predicted_audio"][0] for s in (2, 3))
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


@pytest.mark.parametrize("ref_samples", [50, 300, 461, 905])
@torch.no_grad()
def test_padding_and_neighbors_do_not_matter(model: Network, ref_samples: int) -> None:
    mixture, ref = noise(1, 603), noise(1, ref_samples, seed=2)
    alone = model({"audio": mixture, "ref": ref})
    batch_audio, batch_ref = noise(3, 1000, seed=3) * 9, noise(3, 1200, seed=4) * 9  # junk beyond the lengths
    batch_audio[1, :603], batch_ref[1, :ref_samples] = mixture[0], ref[0]
    batch_ref[1, ref_samples:] = torch.nan
    together = model(
        {
            "audio": batch_audio,
            "ref": batch_ref,
            "audio_length": torch.tensor([1000, 603, 777]),
            "ref_length": torch.tensor([1200, ref_samples, 999]),
        }
    )
    torch.testing.assert_close(together["predicted_logits"][1], alone["predicted_logits"][0], atol=2e-5, rtol=1e-4)
    for padded, single in zip(together["predicted_audio"], alone["predicted_audio"], strict=True):
        torch.testing.assert_close(padded[1, :603], single[0], atol=2e-5, rtol=1e-4)
        assert padded[1, 603:].abs().max() == 0


@torch.no_grad()
def test_gain_and_offset_of_the_inputs(model: Network) -> None:
    mixture, ref = noise(1, 600), noise(1, 900, seed=2)
    plain = model({"audio": mixture, "ref": ref})["predicted_audio"][0]
    louder = model({"audio": mixture * 50 + 7, "ref": ref * 0.001 - 0.3})["predicted_audio"][0]
    torch.testing.assert_close(louder, plain * 50, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_silence_in_silence_out(model: Network) -> None:
    estimate = model({"audio": torch.zeros(1, 500), "ref": noise(1, 900)})["predicted_audio"][0]
    assert estimate.abs().max() == 0
    assert model({"audio": noise(1, 500), "ref": torch.zeros(1, 900)})["predicted_audio"][0].isfinite().all()


@torch.no_grad()
def test_an_embedding_serves_many_mixtures(model: Network) -> None:
    ref, mixtures = noise(1, 900), noise(3, 500, seed=5)
    embedding = model.embed(ref)
    for mixture in mixtures:
        whole = model({"audio": mixture[None], "ref": ref})["predicted_audio"][0]
        torch.testing.assert_close(model.extract(mixture[None], embedding)[0], whole)


def test_one_batch_is_learned_by_heart(model: Network) -> None:
    """Two voices at fixed frequencies, told apart by the enrollment alone: the same mixture, two targets."""
    time = torch.arange(1600) / 8000
    low, high = torch.sin(2 * torch.pi * 300 * time), torch.sin(2 * torch.pi * 1500 * time)
    batch = {"audio": (low + high).expand(2, -1), "ref": torch.stack([low, high])}
    targets = torch.stack([low, high])
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        estimate = model(batch)["predicted_audio"][0]
        error = (estimate - targets).square().sum() / targets.square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if error < 0.05:
            break
    assert error < 0.05  # SI-SDR above 13 dB from 0 dB


@pytest.mark.parametrize(("name", "count"), [("spexplus", 3), ("bandsplit", 1)])
@torch.no_grad()
def test_the_number_of_estimates(name: str, count: int) -> None:
    assert len(network(name)({"audio": noise(1, 400), "ref": noise(1, 900)})["predicted_audio"]) == count


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_config_survives_json(kind: str) -> None:
    assert from_dict(type(SMALL_CONFIGS[kind]), to_dict(SMALL_CONFIGS[kind])) == SMALL_CONFIGS[kind]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_section_selects_its_network_by_name(kind: str) -> None:
    section: Any = from_dict(Section, {"model": {"name": kind, "num_classes": 7}}).model
    assert type(section) is MODELS[kind].config_class
    assert (section.name, section.num_classes) == (kind, 7)


def test_without_a_name_a_section_is_spexplus() -> None:
    assert from_dict(Section, {"model": {}}).model == SpExPlusConfig()
    assert from_dict(Section, {}).model == SpExPlusConfig(blocks=3)
    with pytest.raises(ConfigError, match=r"model\.name: input should be one of .*'spexplus'.*, not \"wesep\""):
        from_dict(Section, {"model": {"name": "wesep"}})


# SpEx+ itself


def test_the_published_size() -> None:
    model = SpExPlus(SpExPlusConfig(sample_rate=8000))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 11.14
    assert SpExPlusConfig(sample_rate=8000).windows == (20, 80, 160)
    assert SpExPlusConfig().windows == (40, 160, 320)


@pytest.mark.parametrize("sample_rate", [8000, 16000])
@torch.no_grad()
def test_parity_with_the_published_equations(sample_rate: int) -> None:
    torch.manual_seed(3)
    config = SpExPlusConfig(
        sample_rate=sample_rate, filters=24, channels=16, hidden=32, blocks=4, stacks=2, normalize_level=False
    )
    model = SpExPlus(config).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    mixture, ref = noise(1, 100 * config.hop), noise(1, 90 * config.hop, seed=2)
    ours = model({"audio": mixture, "ref": ref})
    estimates, logits = spexplus(mixture[0], ref[0], model.state_dict(), config.windows, config.blocks, config.stacks)
    for our, plain in zip(ours["predicted_audio"], estimates, strict=True):
        assert (our[0].double() - plain).abs().max() < 1e-4 * plain.abs().max()
    torch.testing.assert_close(ours["predicted_logits"][0].double(), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("samples", "ref_samples"), [(1000, 1740), (1009, 3333), (1019, 2602), (1111, 1640)])
@torch.no_grad()
def test_parity_with_the_original_system_at_any_length(samples: int, ref_samples: int) -> None:
    torch.manual_seed(3)
    config = SpExPlusConfig(
        sample_rate=16_000, filters=8, channels=8, hidden=16, blocks=3, stacks=2, speaker_dim=8,
        normalize_level=False, norm_eps=1e-7, whole_frames=True,
    )  # fmt: skip
    model = SpExPlus(config).double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    mixture, ref = 0.01 * noise(1, samples).double(), 0.01 * noise(1, ref_samples, seed=2).double()
    ours = model({"audio": mixture, "ref": ref})
    weights = model.state_dict()
    estimates, logits = spexplus(mixture[0], ref[0], weights, config.windows, 3, 2, original=True)
    for our, plain in zip(ours["predicted_audio"], estimates, strict=True):
        torch.testing.assert_close(our[0], plain, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(ours["predicted_logits"][0], logits, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filter": 3}, "filter: unknown key; did you mean 'filters'"),
        ({"filters": "many"}, "filters: "),
        ({"blocks": 0}, "blocks: "),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"window_seconds": [0.02, 0.01, 0.0025]}, "window_seconds must rise"),
    ],
)
def test_wrong_configs_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(SpExPlusConfig, change)


# Blocks against torch's own layers


@pytest.mark.parametrize("hidden", [10**12, 2**64])
def test_sizes_that_no_memory_can_hold(hidden: int) -> None:
    with pytest.raises(ConfigError, match=r"^model: cannot be built in these sizes"):
        build(SpExPlusConfig(hidden=hidden))


@torch.no_grad()
def test_decoder_is_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    decoder = SpeechDecoder(filters=6, window=16, hop=4)
    frames = noise(2, 6, 30)
    oracle = F.conv_transpose1d(frames, decoder.weight[:, None], decoder.bias, stride=4)[:, 0]
    torch.testing.assert_close(decoder(frames.transpose(1, 2), oracle.shape[1]), oracle)


def test_the_masked_global_norm_equals_group_norm_on_the_valid_part() -> None:
    frames, mask = noise(2, 6, 40) * 3 + 1, torch.zeros(2, 1, 40)
    mask[:, :, :25] = 1
    ours = GlobalNorm(6)(frames, mask)
    torch.testing.assert_close(ours[:, :, :25], F.group_norm(frames[:, :, :25], 1), atol=1e-5, rtol=1e-4)
    assert ours[:, :, 25:].abs().max() == 0


def test_batch_norm_equals_torchs_on_the_valid_frames() -> None:
    frames, mask = noise(2, 40, 6) * 3 + 1, torch.zeros(2, 40, 1)
    mask[:, :25] = 1
    plain, whole, masked = nn.BatchNorm1d(6), ValidBatchNorm(6), ValidBatchNorm(6)
    for norm in (plain, whole, masked):
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(3))
    valid = frames[:, :25]
    expected = plain(valid.flatten(0, 1)).unflatten(0, (2, 25))
    torch.testing.assert_close(whole(valid), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked(frames, mask)[:, :25], expected, atol=1e-5, rtol=1e-4)
    for norm in (whole, masked):
        for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.eval()(valid), plain.eval()(valid.flatten(0, 1)).unflatten(0, (2, 25)))


def test_copies_are_independent(model: Network) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize("name", list(SMALL_CONFIGS))
def test_the_estimate_without_gradients_is_the_same(name: str) -> None:
    """Without gradients, SpEx+ adds up the taps of its depthwise convolutions itself."""
    torch.manual_seed(0)
    model = MODELS[name](SMALL_CONFIGS[name]).eval()
    batch: Batch = {"audio": torch.randn(2, 3001), "ref": torch.randn(2, 4000)}
    expected = model(batch)["predicted_audio"][0].detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(batch)["predicted_audio"][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("speaker_dim", [0, 8])
def test_a_temporal_block_gives_the_same_without_gradients(
    dtype: torch.dtype, tolerance: float, speaker_dim: int
) -> None:
    """Without gradients, a CPU runs other operations for the same block."""
    torch.manual_seed(0)
    block = TemporalBlock(16, 32, 3, 2, speaker_dim)
    for value in block.parameters():
        nn.init.normal_(value, std=0.3)
    frames = torch.randn(2, 16, 40)
    embedding = torch.randn(2, speaker_dim) if speaker_dim else None
    expected = block(frames, embedding)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = block(frames, embedding)
    assert ours.dtype == torch.float32
    error = (ours - expected).square().mean() / (expected - frames).square().mean()
    assert error.sqrt() < tolerance
