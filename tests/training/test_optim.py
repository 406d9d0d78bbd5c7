"""Muon beside AdamW: what each moves, steps that are skipped, and a state that is saved and loaded."""

import copy

import pytest
import torch
from tiny import SMALL_CONFIGS
from torch import Tensor, nn

from onevoice.errors import ConfigError
from onevoice.models import Network, build
from onevoice.training.experiment import OptimizerConfig
from onevoice.training.optim import build_optimizer

CONFIG = OptimizerConfig("muon", learning_rate=0.01)


def model_with_gradients(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = build(SMALL_CONFIGS["bandsplit"])
    set_gradients(model, seed)
    return model


def set_gradients(model: Network, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_matrices_move_by_orthogonal_updates_and_the_rest_as_by_adamw() -> None:
    model = model_with_gradients()
    twin, before = copy.deepcopy(model), weights(model)
    set_gradients(twin, 0)
    optimizer = build_optimizer(model, CONFIG)
    optimizer.step()
    torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.0).step()
    by_adam = weights(twin)
    matrices = 0
    for name, after in weights(model).items():
        if name.endswith(("expand.weight", "mix.weight", "film.0.weight", "keys.weight")):
            # A matrix of size a × b moves by rate × 0.2 √max(a, b) × a matrix whose singular values are near 1.
            values = torch.linalg.svdvals((before[name] - after).double()) / (0.01 * 0.2 * max(after.shape) ** 0.5)
            assert 0.3 < values.min() < values.max() < 1.5
            matrices += 1
        elif after.ndim != 2 or name.startswith("classifier") or name.endswith("taps"):
            assert torch.allclose(after, by_adam[name], atol=1e-6)
    assert matrices == 15


def test_a_step_is_skipped_if_something_is_not_finite() -> None:
    model = model_with_gradients()
    optimizer, before = build_optimizer(model, CONFIG), weights(model)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_loaded_state_goes_on_with_the_same_bits() -> None:
    model = model_with_gradients()
    optimizer = build_optimizer(model, CONFIG)
    optimizer.step()
    copied = copy.deepcopy(model)
    loaded = build_optimizer(copied, CONFIG)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (copied, loaded)):
        set_gradients(each, 1)
        its.param_groups[0]["lr"] = its.param_groups[1]["lr"] = 0.003
        its.step()
    assert all(torch.equal(value, weights(copied)[name]) for name, value in weights(model).items())


def test_a_torch_without_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"optimizer\.name: muon needs torch 2\.9 or newer"):
        build_optimizer(model_with_gradients(), CONFIG)
