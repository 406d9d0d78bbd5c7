"""Windows: the parts of a long recording add up to the estimate for the whole."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL_CONFIGS
from voices import Voice

from onevoice.extraction import windows
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.windows import Plan, Spool, estimate_windows, make_plan, measure_level
from onevoice.models import MODELS, ModelConfig
from onevoice.models.base import Level


def extractor_of(config: ModelConfig) -> Extractor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Extractor(MODELS[config.name](config), Card(config))


def recording(seconds: float, offset: float = 0.0) -> np.ndarray:
    """Two voices, whose level changes, at 8 kHz."""
    sound = Voice.number(0).say(0, seconds) + Voice.number(1).say(1, seconds)
    return (sound * np.linspace(0.2, 1.0, len(sound)) + offset).astype(np.float32)


def difference_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    wide = theirs.astype(np.float64)
    return float(10 * np.log10(np.sum((ours - wide) ** 2) / np.sum(wide**2)))


@pytest.mark.parametrize("core_seconds", [0.5, 1.03])
@pytest.mark.parametrize("length", [40_000, 39_999, 40_001])
def test_a_network_with_a_known_context_gives_the_same_in_windows(
    monkeypatch: pytest.MonkeyPatch, core_seconds: float, length: int
) -> None:
    extractor = extractor_of(SMALL_CONFIGS["bandsplit"])
    mixture, voice = recording(length / 8000, offset=0.1), extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    whole = extractor.extract(mixture, 8000, voice)
    monkeypatch.setattr(windows, "EXACT_CORE_SECONDS", core_seconds)
    assert make_plan(extractor.card.config, length).count > 4
    assert difference_db(extractor.extract(mixture, 8000, voice), whole) < -100


def test_a_network_with_statistics_of_the_whole_comes_close_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = extractor_of(SMALL_CONFIGS["spexplus"])
    mixture = Voice.number(0).say(0, 20.0) + Voice.number(1).say(1, 20.0)
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    whole = extractor.extract(mixture, 8000, voice)
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 10.0)
    assert make_plan(extractor.card.config, len(mixture)).count == 4
    in_windows = extractor.extract(mixture, 8000, voice)
    assert not np.array_equal(in_windows, whole)
    assert difference_db(in_windows, whole) < -15
    jumps = np.abs(np.diff(in_windows - whole))
    borders = [index * make_plan(extractor.card.config, len(mixture)).core for index in (1, 2, 3)]
    assert max(jumps[border - 5 : border + 5].max() for border in borders) <= jumps.max() / 2  # no clicks at borders


@pytest.mark.parametrize("name", ["spexplus", "bandsplit"])
@pytest.mark.parametrize("samples", [1, 799, 8000 * 61, 8000 * 64 + 1, 8000 * 1000, 8000 * 3600 * 3 + 17])
def test_the_cores_cover_a_recording_once(name: str, samples: int) -> None:
    plan = make_plan(SMALL_CONFIGS[name], samples)
    bounds = [plan.bounds(index) for index in range(plan.count)]
    assert [first for *_, first, _ in bounds] == [0, *(last for *_, last in bounds[:-1])]
    assert bounds[-1][3] == samples
    hop = SMALL_CONFIGS[name].hop
    assert all(start % hop == 0 and 0 <= start <= first < last <= end <= samples for start, end, first, last in bounds)
    longest = max(end - start for start, end, *_ in bounds)
    assert longest <= 8000 * 65


def test_a_window_gets_the_level_of_the_whole() -> None:
    sound = recording(3.0, offset=0.2)
    with Spool() as spool:
        spool.append(sound)
        level = measure_level(spool)
    assert level.mean == pytest.approx(sound.mean(dtype=np.float64), rel=1e-6)
    assert level.rms == pytest.approx(sound.std(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("memory", [100, 2**20])
def test_a_spool_returns_what_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: int) -> None:
    monkeypatch.setattr(windows, "SPOOL_MEMORY", memory)
    sound = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    with Spool(tmp_path) as spool:
        for first in range(0, 1000, 300):
            spool.append(sound[first : first + 300])
            np.testing.assert_array_equal(spool.read(first, first + 10), sound[first : first + 10])
        assert spool.samples == 1000
        np.testing.assert_array_equal(spool.read(990, 2000), sound[990:])
        np.testing.assert_array_equal(np.concatenate(list(spool.blocks())), sound)
        spool.cut(10)
        spool.append(sound[:5])
        np.testing.assert_array_equal(spool.read(0, 99), np.concatenate([sound[:10], sound[:5]]))


def test_a_spool_with_a_name_survives(tmp_path: Path) -> None:
    for part in (np.ones(3, np.float32), np.zeros(2, np.float32)):
        with Spool(path=tmp_path / "a.spool") as spool:
            spool.append(part)
    with Spool(path=tmp_path / "a.spool") as spool:
        assert spool.read(0, 9).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["spexplus", "bandsplit"])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_an_estimate_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, name: str, done: int) -> None:
    """Half a window after whole ones is done again; whole ones are not."""
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 5.5)
    monkeypatch.setattr(windows, "EXACT_CORE_SECONDS", 1.5)
    extractor = extractor_of(SMALL_CONFIGS[name])
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    plan = make_plan(extractor.card.config, 48_000)
    assert plan.count == 4
    with Spool() as mixture, Spool() as whole, Spool() as pieces:
        mixture.append(recording(6.0))
        gain = extractor.separate(mixture, whole, voice)
        pieces.append(whole.read(0, min(done * plan.core + 77, plan.samples)))
        reported: list[int] = []
        assert extractor.separate(mixture, pieces, voice, reported.append) == gain
        np.testing.assert_array_equal(pieces.read(0, 48_000), whole.read(0, 48_000))
    assert reported[0] == min(done * plan.core, plan.samples)
    assert len(reported) == 1 + plan.count - done


def test_threads_share_the_windows() -> None:
    """Two run at once, in order, with one torch thread each; an error in one ends all."""
    plan, together, before = Plan(1000, 100, 10, 5), threading.Barrier(2, timeout=60), torch.get_num_threads()

    def double(sound: torch.Tensor, level: Level | None) -> torch.Tensor:
        together.wait()
        assert torch.get_num_threads() == 1
        return 2 * sound

    def fail(sound: torch.Tensor, level: Level | None) -> torch.Tensor:
        raise ValueError("no")

    with Spool() as mixture:
        mixture.append(np.arange(1000, dtype=np.float32))
        level = measure_level(mixture)
        found = list(estimate_windows(double, plan, mixture, level, threads=2))
        with pytest.raises(ValueError, match="no"):
            list(estimate_windows(fail, plan, mixture, level, threads=2))
    np.testing.assert_allclose(np.concatenate(found), 2 * np.arange(1000), rtol=1e-6)  # fades round
    assert torch.get_num_threads() == before


def test_a_recording_is_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 5.5)
    extractor = extractor_of(SMALL_CONFIGS["spexplus"])
    voice, found = extractor.enroll(Voice.number(0).say(2, 2.0), 8000), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(extractor.extract(recording(6.0), 8000, voice))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_a_plan_of_one_window_has_no_context() -> None:
    config = replace(SMALL_CONFIGS["spexplus"])
    assert make_plan(config, 8000) == Plan(8000, 8000, 0, 0)
