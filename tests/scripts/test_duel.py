"""The bench for ideas: configs trained for equal time on the same draws."""

import re
from pathlib import Path

import pytest
from duel import Contender
from tiny import ROOT
from toy_runs import forked_process, write_experiment
from voices import make_trials

ROW = re.compile(r"(plain|small) +([\d.]+) +(\d+) +[\d.]+ +-?[\d.]+ +-?[\d.]+ ± [\d.]+ +-?[\d.]+ +\d+%")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "toy.json", make_trials(tmp_path / "trials", 8), training__ema=0.9)


def test_every_contender_gets_its_time_and_a_comparison(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    command = [ROOT / "benchmarks" / "duel.py", config, "plain", "small: model.hidden=4 model.channels=4"]
    options = ["--seconds", "0.6", "--turn", "0.1", "--validations", "2"]
    done = forked_process([*command, *options])
    assert (done.status, done.err) == (0, "")
    rows = [match.groups() for match in map(ROW.fullmatch, done.out.splitlines()) if match]
    assert [name for name, _, _ in rows] == ["plain", "small", "plain", "small"]
    assert all(int(examples) > 0 for _, _, examples in rows)
    assert done.out.splitlines()[-1].startswith("small − plain: ")
    assert not (config.parent / "runs").exists()


def test_contenders_see_the_same_draws(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    for text in ("plain", "small: model.hidden=4"):
        contender = Contender.open(config, text)
        step, names = contender.trainer.learner.step, []

        def spy(batch, step=step, names=names):  # type: ignore[no-untyped-def]
            names.append(batch["name"])
            return step(batch)

        monkeypatch.setattr(contender.trainer.learner, "step", spy)
        while contender.trainer.state.progress.step < 5:
            contender.train_until(contender.used + 1e-6, total=100.0, decay=0.3)
        seen.append(names)
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][2]


def test_the_rate_warms_up_stays_and_falls(config: Path) -> None:
    contender = Contender.open(config, "plain: optimizer.learning_rate=0.001")
    (group,) = contender.trainer.state.optimizer.param_groups
    contender.train_until(1e-6, total=1.0, decay=0.3)
    assert group["lr"] < 0.1 * 0.001
    contender.trainer.state.progress.step = 1000
    contender.used = 0.7
    contender.train_until(0.7001, total=1.0, decay=0.3)
    assert group["lr"] == pytest.approx(0.001)
    contender.used = 0.99999
    contender.train_until(1.0, total=1.0, decay=0.3)
    assert group["lr"] == pytest.approx(1e-5, rel=0.05)
