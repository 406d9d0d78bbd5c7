"""Muon beside AdamW: what each moves, steps that are skipped, and a state that is saved and loaded."""

import copy

import pytest
import torch
from tiny import SMALL_CONFIGS
from torch import Tensor, nn

from onevoice.models import Network, build
from onevoice.training import muon
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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_moves_as_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps with wide, tall, and square matrices, and one without a gradient; torch computes in bfloat16."""
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: True)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (10, 6), (8, 8), (6, 10), (3, 3))]
    theirs = copy.deepcopy(ours)
    each = (
        muon.Muon(ours, 0.01, weight_decay=0.1, momentum=0.9),
        torch.optim.Muon(theirs, 0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    )
    before = ours[0].detach().clone()
    for _ in range(5):
        for mine, its in zip(ours[:-1], theirs[:-1], strict=True):
            mine.grad = its.grad = torch.randn_like(mine)
        for optimizer in each:
            optimizer.step()
    step = (ours[0] - before).abs().mean().item()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0.02 * step)


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (1, 4, 4), (1, 1, 4)])
def test_orthogonalized_matrices_keep_their_singular_vectors(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = muon.orthogonalize(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ found @ right.mT  # the singular values of the result, if its vectors are the same
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.05).all()
    torch.testing.assert_close(rotated, torch.diag_embed(diagonal), rtol=0, atol=1e-5)
    assert 0.6 < diagonal.min() <= diagonal.max() < 1.3
    assert muon.orthogonalize(torch.zeros(shape)).abs().max() == 0
