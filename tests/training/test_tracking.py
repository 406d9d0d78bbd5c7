"""The record of a run: the content of its files, above all after a kill and a resume."""

import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from onevoice.audio import read_audio
from onevoice.config import from_dict, to_dict
from onevoice.errors import ConfigError, MissingDependencyError, StorageError
from onevoice.training import tracking
from onevoice.training.tracking import (
    KEPT_VALIDATIONS,
    Tracker,
    TrackingConfig,
    WandbConfig,
    open_tracker,
    read_rows,
    read_samples,
)

PLAIN = TrackingConfig()


def sound(level: float = 0.5, samples: int = 800) -> np.ndarray:
    return (level * np.sin(np.arange(samples) * 0.3)).astype(np.float32)


def record(folder: Path, steps: range, resume_step: int | None = None, config: TrackingConfig = PLAIN) -> None:
    with closing(open_tracker(config, folder, "run", {"seed": 1}, resume_step)) as tracker:
        for step in steps:
            tracker.scalars(step, {"train/loss": 1 / (1 + step)}, epoch=step // 4)
            if step % 4 == 3:
                tracker.scalars(step, {"validation/si_sdr_improvement": float(step)}, epoch=step // 4)
                tracker.audio(step, "trial-0", {"estimate": sound()}, 8000)


def without_time(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "wall_time"} for row in rows]


def test_each_line_is_an_object_with_step_epoch_time_and_values(tmp_path: Path) -> None:
    before = time.time()
    with closing(open_tracker(PLAIN, tmp_path / "run", "run", {})) as tracker:
        tracker.scalars(7, {"train/loss": 1.25, "train/learning_rate": 1e-3}, epoch=2)
        text = (tmp_path / "run" / "metrics.jsonl").read_text()  # on the disk before the tracker is closed
    assert text.endswith("\n")
    row = json.loads(text)
    assert before - 1 < row.pop("wall_time") < time.time() + 1
    assert row == {"step": 7, "epoch": 2, "train/loss": 1.25, "train/learning_rate": 1e-3}


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker:
        tracker.scalars(1, {"a": float("nan"), "b": float("inf"), "c": np.float32(0.5), "d": -np.inf}, epoch=0)
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, 0.5, None)


def test_a_scalar_cannot_take_the_place_of_the_step(tmp_path: Path) -> None:
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker, pytest.raises(ValueError, match="'step'"):
        tracker.scalars(1, {"step": 2.0}, epoch=0)


def test_a_killed_and_resumed_run_leaves_the_record_of_an_uninterrupted_one(tmp_path: Path) -> None:
    record(tmp_path / "whole", range(12))
    record(tmp_path / "cut", range(10))  # killed at step 9; its last checkpoint is of step 5
    record(tmp_path / "cut", range(6, 11), resume_step=5)
    record(tmp_path / "cut", range(8, 12), resume_step=7)
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")
    names = [sorted(path.name for path in (tmp_path / run / "samples").iterdir()) for run in ("whole", "cut")]
    assert names[0] == names[1] == [f"step-{step:08d}-trial-0-estimate.wav" for step in (3, 7, 11)]


def test_resuming_drops_the_sounds_of_later_steps(tmp_path: Path) -> None:
    record(tmp_path, range(12))
    (tmp_path / "samples" / "step-mine.wav").write_bytes(b"")
    open_tracker(PLAIN, tmp_path, "run", {}, 7).close()
    kept = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert [name[:13] for name in kept] == ["step-00000003", "step-00000007", "step-mine.wav"]


def test_a_fresh_run_replaces_the_record(tmp_path: Path) -> None:
    record(tmp_path, range(9))
    record(tmp_path, range(2))
    assert [row["step"] for row in without_time(tmp_path)] == [0, 1]
    assert not list((tmp_path / "samples").iterdir())


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "epo', b"\n\xff\xfe\x00", b'{"step": 3}{"step', b"[1]\n", b'{"a": 1}\n']
)
def test_a_torn_line_is_dropped_on_resuming(tmp_path: Path, torn: bytes) -> None:
    record(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    record(tmp_path, range(3, 5), resume_step=9)
    assert [row["step"] for row in without_time(tmp_path) if "train/loss" in row] == [0, 1, 2, 3, 4]


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from onevoice.training.tracking import *\n"
        "tracker = open_tracker(TrackingConfig(), Path(sys.argv[1]), 'run', {})\n"
        "for step in range(50): tracker.scalars(step, {'a': 1.0}, epoch=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(50))


def test_no_record_is_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"run/metrics\.jsonl: cannot be written"):
        open_tracker(PLAIN, tmp_path / "run", "run", {})


def test_sounds_are_files_with_safe_names(tmp_path: Path) -> None:
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker:
        sounds = {"mixture": sound(0.25), "enrollment": sound(0.1, 400)}
        tracker.audio(12, "a/b c", sounds, 16000)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "trial-a_b_c-mixture.wav",
        "trial-a_b_c-enrollment.wav",
    }
    samples, rate = read_audio(tmp_path / "samples" / "trial-a_b_c-mixture.wav")
    assert rate == 16000
    np.testing.assert_allclose(samples, sounds["mixture"], atol=1 / 32768)


def test_sounds_of_undefined_level_neither_clip_nor_fail(tmp_path: Path) -> None:
    broken = sound()
    broken[10:20] = np.nan
    broken[30] = np.inf
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker:
        tracker.audio(1, "loud", {"estimate": sound(40.0)}, 8000)
        tracker.audio(1, "broken", {"estimate": broken}, 8000)
    loud, _ = read_audio(tmp_path / "samples" / "step-00000001-loud-estimate.wav")
    np.testing.assert_allclose(loud, sound(1.0) / np.abs(sound(1.0)).max(), atol=1e-3)
    heard, _ = read_audio(tmp_path / "samples" / "step-00000001-broken-estimate.wav")
    assert (heard[10:20] == 0).all()
    assert heard[30] == 0
    np.testing.assert_allclose(heard[40:], sound()[40:], atol=1 / 32768)


def test_samples_hold_the_latest_validations_only(tmp_path: Path) -> None:
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker:
        for step in range(0, 1000, 100):
            for name in ("one", "two"):
                tracker.audio(step, name, {"estimate": sound()}, 8000)
    kept = {int(path.name[5:13]) for path in (tmp_path / "samples").iterdir()}
    assert kept == set(range(0, 1000, 100)[-KEPT_VALIDATIONS:])
    assert len(list((tmp_path / "samples").iterdir())) == 2 * KEPT_VALIDATIONS


def test_sounds_that_do_not_change_are_recorded_once(tmp_path: Path) -> None:
    """TensorBoard shows them at the first validation; resuming from before it records them again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tensorboard=True)

    def validate(steps: range, resume_step: int | None = None) -> None:
        with closing(open_tracker(config, tmp_path, "run", {}, resume_step)) as tracker:
            for step in steps:
                tracker.audio(step, "one", {"mixture": sound(), "estimate": sound()}, 8000)

    validate(range(2, 8))
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "trial-one-mixture.wav", *(f"step-{step:08d}-one-estimate.wav" for step in range(3, 8))
    }  # fmt: skip
    validate(range(8, 10), resume_step=7)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"audio": 0, "images": 0}).Reload()
    assert [player.step for player in events.Audio("one/mixture")] == [2]
    assert [image.step for image in events.Images("one/mixture/spectrogram")] == [2]
    assert [player.step for player in events.Audio("one/estimate")] == list(range(2, 10))
    validate(range(1, 2), resume_step=0)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"audio": 0}).Reload()
    assert [player.step for player in events.Audio("one/mixture")] == [1]


def test_samples_are_read_back_by_trial(tmp_path: Path) -> None:
    with closing(open_tracker(PLAIN, tmp_path, "run", {})) as tracker:
        for step in (4, 8):
            for name in ("b-target", "a"):
                tracker.audio(step, name, {kind: sound() for kind in ("mixture", "target", "estimate")}, 8000)
    one, other = read_samples(tmp_path)
    assert (one.name, other.name) == ("a", "b-target")
    assert {kind: path.name for kind, path in other.constant.items()} == {
        "mixture": "trial-b-target-mixture.wav", "target": "trial-b-target-target.wav"
    }  # fmt: skip
    assert [(step, path.name) for step, path in one.estimates.items()] == [
        (4, "step-00000004-a-estimate.wav"), (8, "step-00000008-a-estimate.wav"),
    ]  # fmt: skip


def test_a_tracker_without_a_folder_records_nothing() -> None:
    with closing(Tracker()) as tracker:
        tracker.scalars(1, {"a": 1.0}, epoch=0)
        tracker.audio(1, "a", {"estimate": sound()}, 8000)
        tracker.flush()


def test_every_record_is_closed_even_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Writer:
        def close(self) -> None:
            closed.append("tensorboard")
            raise OSError("gone")

    class Run:
        def finish(self) -> None:
            closed.append("wandb")

    monkeypatch.setattr(tracking, "_open_tensorboard", lambda *_: Writer())
    monkeypatch.setattr(tracking, "_open_wandb", lambda *_: Run())
    tracker = open_tracker(TrackingConfig(WandbConfig("p"), tensorboard=True), tmp_path, "run", {})
    with pytest.raises(OSError, match="gone"):
        tracker.close()
    assert sorted(closed) == ["tensorboard", "wandb"]
    assert tracker.metrics.closed
    tracker.close()


def test_what_was_opened_is_closed_when_opening_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Writer:
        def close(self) -> None:
            closed.append("tensorboard")

    def refuse(*_: object) -> None:
        raise ConfigError("tracking.wandb: no")

    monkeypatch.setattr(tracking, "_open_tensorboard", lambda *_: Writer())
    monkeypatch.setattr(tracking, "_open_wandb", refuse)
    with pytest.raises(ConfigError, match="no"):
        open_tracker(TrackingConfig(WandbConfig("p"), tensorboard=True), tmp_path, "run", {})
    assert closed == ["tensorboard"]


def test_tensorboard_shows_scalars_and_sounds_without_the_steps_that_were_repeated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tensorboard=True)
    record(tmp_path, range(10), config=config)
    record(tmp_path, range(6, 12), resume_step=5, config=config)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "audio": 0}).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(12))
    assert losses[3].value == pytest.approx(0.25)
    assert events.Scalars("validation/si_sdr_improvement")[0].value == 3.0
    players = events.Audio("trial-0/estimate")
    assert [player.step for player in players] == [3, 7, 11]
    assert players[0].sample_rate == 8000.0
    assert [image.step for image in events.Images("trial-0/estimate/spectrogram")] == [3, 7, 11]
    assert "experiment/text_summary" in events.Tags()["tensors"]


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep everything that wandb writes in a temporary folder, and switch off its error reports."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return tmp_path / "run"


def test_wandb_offline_needs_no_network_and_keeps_the_run_id(offline_wandb: Path) -> None:
    config = TrackingConfig(wandb=WandbConfig(project="onevoice-tests", mode="offline"))
    record(offline_wandb, range(4), config=config)
    run_id = (offline_wandb / "wandb_id.txt").read_text()
    [run] = (offline_wandb / "wandb").glob("offline-run-*")
    [log] = run.glob("*.wandb")
    expected = (b"onevoice-tests", b"train/loss", b"validation/si_sdr_improvement", b"0.25", b"seed")
    patience = time.monotonic() + 300  # wandb's own process may still be writing
    while not all(part in log.read_bytes() for part in expected) and time.monotonic() < patience:
        time.sleep(0.05)
    content = log.read_bytes()
    assert [part for part in expected if part not in content] == []
    [player] = run.rglob("*.wav")
    assert len(read_audio(player)[0]) == 800
    [table] = run.rglob("*.table.json")
    columns, [row] = json.loads(table.read_text()).values()
    shown = {name: value for name, value in zip(columns, row, strict=True) if value is not None}
    assert shown == {"trial": "trial-0", "step": 3, "estimate": "Audio", "estimate spectrogram": "Image"}
    sample = (offline_wandb / "samples" / "step-00000003-trial-0-estimate.wav").read_bytes()
    staged = [path.read_bytes() for path in (offline_wandb.parent / "home").rglob("*") if path.is_file()]
    assert sample in staged

    record(offline_wandb, range(4, 5), resume_step=3, config=config)
    assert (offline_wandb / "wandb_id.txt").read_text() == run_id
    assert len([run for run in (offline_wandb / "wandb").glob("offline-run-*") if run_id in run.name]) == 2
    record(offline_wandb, range(1), config=config)
    assert (offline_wandb / "wandb_id.txt").read_text() != run_id


def test_wandb_that_cannot_start_is_one_line(offline_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    config = TrackingConfig(wandb=WandbConfig(project="p"))
    with pytest.raises(ConfigError, match=r"cannot start \(No API key configured\.\).*mode=offline") as caught:
        open_tracker(config, offline_wandb, "run", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [WandbConfig(), WandbConfig(mode="offline"), WandbConfig(project="p", mode="disabled")]
)
def test_wandb_is_not_touched_without_a_project_or_when_disabled(
    config: WandbConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, range(1), config=TrackingConfig(wandb=config))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize(
    ("module", "extra", "config"),
    [
        ("wandb", "wandb", TrackingConfig(wandb=WandbConfig(project="p", mode="offline"))),
        ("torch.utils.tensorboard", "tensorboard", TrackingConfig(tensorboard=True)),
    ],
)
def test_a_missing_package_names_its_extra_and_leaves_the_old_record(
    module: str, extra: str, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, range(2))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "onevoice\[{extra}\]".*set tracking\.{extra}'):
        open_tracker(config, tmp_path, "run", {})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_config_section() -> None:
    assert from_dict(TrackingConfig, to_dict(TrackingConfig())) == TrackingConfig()
    values = {"wandb": {"project": "p", "mode": "offline"}, "tensorboard": True, "audio_examples": 0}
    assert from_dict(TrackingConfig, values).wandb == WandbConfig("p", "offline")
    for broken, message in (
        ({"wandb": {"projct": "p"}}, "wandb.projct: unknown key; did you mean 'project'"),
        ({"wandb": {"mode": "of"}}, "wandb.mode"),
        ({"audio_examples": -1}, "audio_examples"),
        ({"tensorboard": 1}, "tensorboard"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(TrackingConfig, broken)


def test_importing_tracking_brings_no_heavy_package() -> None:
    heavy = "{'torch', 'wandb', 'tensorboard'}"
    code = f"import sys, onevoice.training.tracking; sys.exit(len({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flush_is_safe_at_any_time(tmp_path: Path) -> None:
    tracker = open_tracker(PLAIN, tmp_path, "run", {})
    tracker.flush()
    tracker.scalars(1, {"a": 1.0}, epoch=0)
    tracker.flush()
    tracker.close()
    tracker.flush()
    assert [row["a"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0]
