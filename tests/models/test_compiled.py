"""The compiled path against the layers: same gradients, statistics and learning, and compiling only where it pays."""

import copy
import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onevoice.models import Batch, Network, SpExPlus, SpExPlusConfig, layers, spexplus
from onevoice.models.spexplus import max_pool
from onevoice.training.loss import MultiLoss

SIZES = {
    "sample_rate": 8000, "filters": 16, "channels": 12, "hidden": 20, "blocks": 1, "stacks": 3, "speaker_dim": 10,
    "num_classes": 5,
}  # fmt: skip
CONFIG = SpExPlusConfig(**SIZES)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler here"
)
NO_GRADIENT = ("decoders.0.bias", "decoders.1.bias", "decoders.2.bias")
"""SI-SDR centers the estimates, so the gradient of these is only rounding."""


def voice(pitch: float, samples: int) -> Tensor:
    time = torch.arange(samples, dtype=torch.float64) / 8000
    tones = sum(torch.sin(2 * torch.pi * pitch * k * time) / k for k in range(1, 8))
    return tones * (1 + torch.sin(2 * torch.pi * 3.1 * time + pitch))


def example(samples: int = 8000) -> tuple[Batch, Tensor, Tensor]:
    """Two mixtures of harmonic voices, enrollments of unequal length, targets, and speakers, in float64."""
    ref_samples = samples * 3 // 4
    noise = torch.randn(2, samples, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.stack([voice(110.0, samples), voice(210.0, samples)])
    mixture = target + torch.stack([voice(170.0, samples), voice(140.0, samples)]) + 0.1 * noise
    ref = torch.stack([voice(112.0, ref_samples), voice(205.0, ref_samples)]) + 0.1 * noise[:, :ref_samples]
    lengths = torch.tensor([ref_samples, ref_samples * 5 // 6])
    return {"audio": mixture, "ref": ref, "ref_length": lengths}, target, torch.tensor([1, 3])


def gradients(model: Network, dtype: torch.dtype, autocast: bool = False, samples: int = 8000) -> dict[str, Tensor]:
    """Gradients and running statistics of one step, in float64."""
    model = copy.deepcopy(model).to(dtype).train()
    batch, target, speaker = example(samples)
    inputs: Batch = {**batch, "audio": batch["audio"].to(dtype), "ref": batch["ref"].to(dtype)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model(inputs)
    MultiLoss()(prediction, target.to(dtype), speaker).total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if name not in NO_GRADIENT}
    found |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert all(value is not None and value.isfinite().all() for value in found.values())
    return {name: value.detach().double() for name, value in found.items() if value is not None}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """The relative error of each gradient."""
    return torch.stack([(found[name] - truth[name]).norm() / truth[name].norm() for name in truth])


def network(compiled: bool, config: SpExPlusConfig = CONFIG) -> Network:
    torch.manual_seed(0)
    model = SpExPlus(config)
    model.compiled = compiled
    return model


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the compiled path operation by operation."""
    for module in (layers, spexplus):
        monkeypatch.setattr(module, "compile_once", lambda function: function)


CHANGES: list[dict[str, int]] = [{}, {"kernel_size": 5, "blocks": 3, "stacks": 2}, {"normalize_level": False}]


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_formulation_has_the_gradients_of_the_layers(change: dict[str, int]) -> None:
    config = replace(CONFIG, **change)
    plain, compiled = (gradients(network(on, config), torch.float64) for on in (False, True))
    assert errors(compiled, plain).max() < 1e-9


class OneScale(SpExPlusConfig):
    """The config of a network with the short windows only."""

    @property
    def windows(self) -> tuple[int, ...]:
        return super().windows[:1]


SHORT = 1600
"""Samples of the mixtures in the tests that compile."""


def smallest_network(compiled: bool) -> Network:
    """A network that compiles fast: one scale, and one residual block in the speaker encoder."""
    torch.manual_seed(3)
    model = SpExPlus(OneScale(**SIZES))
    model.speaker_encoder.blocks = model.speaker_encoder.blocks[1:2]
    model.compiled = compiled
    return model


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile fast, to scalar code, and without the shape checks of the test suite, which a compiler cannot read."""
    import torch._inductor.config as settings

    jaxtyping.config.update("jaxtyping_disable", True)
    with settings.patch({"cpp.simdlen": 1, "cpp.vec_isa_ok": False}):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    """Forget what other files compiled: variants count toward a limit, beyond which torch runs the plain code."""
    torch.compiler.reset()


def relative_errors(compiled: bool, autocast: bool) -> Tensor:
    from torch._dynamo.utils import counters  # here, because it loads much

    truth = gradients(smallest_network(False), torch.float64, samples=SHORT)
    graphs = counters["stats"]["unique_graphs"]
    found = errors(gradients(smallest_network(compiled), torch.float32, autocast, SHORT), truth)
    assert (counters["stats"]["unique_graphs"] > graphs) == compiled
    return found


def test_traced_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the code generator, which is torch's own: what can go wrong here is what it is given."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    compile_once = functools.cache(functools.partial(torch.compile, dynamic=False, backend="aot_eager"))
    for module in (layers, spexplus):
        monkeypatch.setattr(module, "compile_once", compile_once)
    exact, usual = (relative_errors(compiled, autocast=False) for compiled in (True, False))
    assert exact.median() < 1e-5
    assert exact.max() < max(1e-5, 3 * float(usual.max()))


@needs_compiler
@pytest.mark.usefixtures("compiler")
def test_compiled_gradients_in_bfloat16() -> None:
    rounded, usual = (relative_errors(compiled, autocast=True) for compiled in (True, False))
    assert 1e-4 < rounded.median() < 1.2 * usual.median()


@needs_compiler
@pytest.mark.usefixtures("compiler")
def test_compiled_bfloat16_learns_as_float32_does() -> None:
    batch, target, speaker = example(SHORT)
    inputs: Batch = {**batch, "audio": batch["audio"].float(), "ref": batch["ref"].float()}
    curves = []
    for compiled in (False, True):
        model = smallest_network(compiled).train()
        optimizer, curve = torch.optim.Adam(model.parameters(), 4e-3), []
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16, enabled=compiled):
                prediction = model(inputs)
            loss = MultiLoss()(prediction, target.float(), speaker).total
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve).unflatten(0, (10, 6)).mean(1))
    plain, compiled_curve = curves
    assert plain[0] - plain[-1] > 5
    assert (plain - compiled_curve).abs().max() < 0.1 * (plain[0] - plain[-1])


def test_evaluation_and_padded_mixtures_do_not_wait_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def compile_once(function: object) -> object:
        used.append(function)
        return function

    for module in (layers, spexplus):
        monkeypatch.setattr(module, "compile_once", compile_once)
    model, (batch, _, _) = network(True), example()
    inputs: Batch = {"audio": batch["audio"].float(), "ref": batch["ref"].float()}
    model.eval()(inputs)
    assert not used
    model.train()({**inputs, "audio_length": torch.tensor([8000, 7000])})
    assert [getattr(each, "__name__", "") for each in used] == ["_encode_speaker"]


@pytest.mark.usefixtures("without_compiler")
def test_the_compiler_sees_few_lengths_of_enrollments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, met = network(True).train(), []
    plain = spexplus.SpExPlus._encode_speaker

    def watched(self: spexplus.SpExPlus, ref: Tensor, mask: Tensor | None) -> Tensor:
        met.append((tuple(ref.shape), mask is None))
        return plain(self, ref, mask)

    monkeypatch.setattr(spexplus.SpExPlus, "_encode_speaker", watched)
    ref = torch.randn(2, 12_000)
    with torch.no_grad():
        for samples in (8001, 9000, 12_000):
            model.embed(ref[:, :samples])
    assert set(met) == {((2, 16_000), False)}


def test_pooling_takes_the_largest_of_each_window() -> None:
    frames = torch.randn(2, 11, 4)
    oracle = F.max_pool1d(frames.transpose(1, 2), 3).transpose(1, 2)
    torch.testing.assert_close(max_pool(frames), oracle, atol=0, rtol=0)


def test_compiling_changes_no_names() -> None:
    assert network(True).state_dict().keys() == network(False).state_dict().keys()


def test_estimates_are_means_over_filters_and_windows() -> None:
    normalized, published = (network(False, replace(CONFIG, normalize_level=level)).eval() for level in (True, False))
    batch, _, _ = example()
    mixture = batch["audio"].float()
    mixture = (mixture - mixture.mean(1, keepdim=True)) / mixture.std(1, keepdim=True, correction=0)
    with torch.no_grad():
        embedding = torch.randn(2, 10)
        means, sums = normalized.extract(mixture, embedding), published.extract(mixture, embedding)
    for mean, total, window in zip(means, sums, CONFIG.windows, strict=True):
        torch.testing.assert_close(mean, total * CONFIG.hop / (window * CONFIG.filters), atol=1e-6, rtol=1e-4)
