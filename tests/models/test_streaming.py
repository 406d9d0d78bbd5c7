"""Steps of a causal network against the whole, for any division; the state is a value of fixed shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.test_bandsplit import CAUSAL, CONFIG, network, noise
from tiny import SMALL_CONFIGS
from torch import Tensor
from torch.nn import functional as F

from onevoice.errors import ConfigError
from onevoice.models import build
from onevoice.models.streaming import Step

HOP = CAUSAL.hop
MODEL = network(CAUSAL)
STEP = Step(MODEL)
SOUND = noise(1, 40 * HOP + 5)
EMBEDDING = MODEL.embed(noise(1, 4000, seed=2)).detach()


@torch.no_grad()
def run(step: Step, sound: Tensor, hops: list[int]) -> Tensor:
    """The estimate from steps of so many hops each, repeated."""
    padded = F.pad(sound, (0, -sound.shape[1] % HOP + HOP))
    voice, state, parts, first = step.prepare(EMBEDDING.to(step.fourier.analysis)), step.start(), [], 0
    while first < padded.shape[1]:
        size = hops[len(parts) % len(hops)] * HOP
        part, state = step(padded[:, first : first + size], voice, state)
        parts.append(part)
        first += size
    return torch.cat(parts, dim=1)[:, HOP : HOP + sound.shape[1]]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=6))
def test_steps_add_up_to_the_whole(hops: list[int]) -> None:
    with torch.no_grad():
        (whole,) = MODEL.extract(SOUND, EMBEDDING)
    assert (run(STEP, SOUND, hops) - whole).abs().max() < 1e-12 * whole.abs().max()


@torch.no_grad()
def test_single_precision_stays_exact_beyond_every_reach() -> None:
    model = network(CAUSAL).float()
    sound = noise(1, 150 * HOP).float()
    (whole,) = model.extract(sound, EMBEDDING.float())
    error = (run(Step(model), sound, [1, 2]) - whole).abs()
    assert error.max() < 1e-5 * whole.abs().max()
    assert error[:, -50 * HOP :].max() < 1e-5 * whole.abs().max()


@torch.no_grad()
def test_the_state_is_a_value_of_fixed_shapes() -> None:
    voice, state = STEP.prepare(EMBEDDING), STEP.start()
    for _ in range(30):
        _, state = STEP(noise(1, HOP), voice, state)
    kept = {name: value.clone() for name, value in state.items()}
    first, after = STEP(SOUND[:, : 3 * HOP], voice, state)
    again, _ = STEP(SOUND[:, : 3 * HOP], voice, state)
    assert torch.equal(first, again)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert {name: value.shape for name, value in after.items()} == {k: v.shape for k, v in STEP.start().items()}


@pytest.mark.parametrize("config", [SMALL_CONFIGS["spexplus"], CONFIG, replace(CONFIG, blocks=2)])
def test_networks_that_need_the_whole_are_refused(config: object) -> None:
    with pytest.raises(ConfigError, match="a stream needs a causal network"):
        Step(build(config))  # type: ignore[arg-type]
