"""Data sets: the same trials on disk and on the fly, and everything missing or wrong is named and counted."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from plain_librimix import Toy, make_toy, plain_tree
from toy_runs import forked_workers
from voices import make_trials

from onevoice.audio import read_audio, write_audio
from onevoice.errors import AudioError, ConfigError, CorpusError
from onevoice.evaluation.run import EvaluationConfig, evaluate
from onevoice.evaluation.summary import format_report
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.extractor import Extractor
from onevoice.mixing.folder import MANIFEST
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.trials import export_trials, open_trials
from onevoice.trials.config import (
    EnrollmentDraw,
    EnrollmentMapFile,
    FolderTrials,
    LibriMixMetadataTrials,
    LibriMixTrials,
    Wsj0Trials,
)
from onevoice.trials.enrollment import Mixture, draw, mixture_pool, read_map, speaker_of, write_map
from onevoice.trials.librimix_trials import enrollment_map
from onevoice.trials.reading import TrialDataset, collate, find_trials, load_trial
from onevoice.trials.trial import Trial

LibriMix = LibriMixTrials | LibriMixMetadataTrials


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tree(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Libri2Mix as the official script writes it: min, at 8 and 16 kHz."""
    out = tmp_path_factory.mktemp("Libri2Mix")
    for rate in (8000, 16000):
        plain_tree(toy, 2, rate, "min", out)
    return out


def on_the_fly(toy: Toy, **changes: Any) -> LibriMixMetadataTrials:
    return LibriMixMetadataTrials(str(toy.metadata[2]), str(toy.librispeech), wham_dir=str(toy.wham), **changes)


def on_disk(tree: Path, **changes: Any) -> LibriMixTrials:
    return LibriMixTrials(str(tree), part="test", **changes)


def entries(config: LibriMix) -> dict[tuple[str, str], str]:
    return {key: choice.enrollment for key, choice in enrollment_map(config).items()}


# ------------------------------------------------------------------ LibriMix, on disk and on the fly


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("mixture", ["mix_clean", "mix_both", "mix_single"])
def test_on_the_fly_is_the_generated_data_set(toy: Toy, tree: Path, rate: Any, mixture: Any) -> None:
    """The same trials in the same order, with the same enrollments, and every sample equal."""
    written = open_trials(on_disk(tree, sample_rate=rate, mixture=mixture))
    rendered = open_trials(on_the_fly(toy, sample_rate=rate, mixture=mixture))
    assert written.left_out == rendered.left_out == []
    assert written.sample_rate == rendered.sample_rate == rate
    assert len(written.trials) == len(rendered.trials) == (8 if mixture == "mix_single" else 16)
    for one, other in zip(written.trials, rendered.trials, strict=True):
        assert (one.name, one.speaker) == (other.name, other.speaker)
        for first, second in zip(load_trial(one, rate), load_trial(other, rate), strict=True):
            np.testing.assert_array_equal(first, second)


def test_targets_and_speakers_follow_the_names(tree: Path) -> None:
    trials = open_trials(on_disk(tree)).trials
    for trial in trials:
        mixture, _, source = trial.name.rpartition("_")
        assert trial.speaker == mixture.split("_")[int(source[1]) - 1].split("-")[0]
        assert str(trial.target) == str(tree / "wav16k/min/test" / source / f"{mixture}.wav")
        assert str(trial.mixture) == str(tree / "wav16k/min/test/mix_clean" / f"{mixture}.wav")
    assert [trial.name for trial in open_trials(on_disk(tree, targets="first")).trials] == [
        trial.name for trial in trials if trial.name.endswith("_s1")
    ]
    assert open_trials(on_disk(tree, limit=5)).trials == trials[:5]


def test_a_tree_without_metadata_is_listed_by_its_files(toy: Toy, tmp_path: Path) -> None:
    tree = plain_tree(toy, 2, 8000, "min", tmp_path)
    config = on_disk(tree, sample_rate=8000)
    by_metadata = open_trials(config).trials
    for path in (tree / "wav8k/min/metadata").iterdir():
        path.unlink()
    by_listing = open_trials(config).trials
    assert sorted(by_metadata, key=lambda trial: trial.name) == by_listing


def test_trials_make_batches(toy: Toy) -> None:
    """Training treats rendered audio like files: cuts, epochs, speakers, padding."""
    trials = open_trials(on_the_fly(toy, sample_rate=8000)).trials
    speakers = sorted({trial.speaker for trial in trials})
    data = TrialDataset(trials, 8000, speakers, segment_seconds=0.5, enrollment_seconds=0.8)
    batch = collate([data[1, index] for index in range(4)])
    assert batch["audio"].shape == batch["target"].shape == (4, 4000)
    assert batch["speaker"].tolist() == [speakers.index(trial.speaker) for trial in trials[:4]]
    mixture, target, _ = load_trial(trials[0], 16000)
    assert len(mixture) == len(target)
    assert abs(len(mixture) - 2 * len(load_trial(trials[0], 8000)[0])) <= 1


# ------------------------------------------------------------------ enrollments


def test_the_draw_is_another_utterance_of_the_speaker(toy: Toy, tree: Path) -> None:
    drawn = entries(on_the_fly(toy))
    ids = {mixture for mixture, _ in drawn}
    for (_, utterance), entry in drawn.items():
        source, _, mixture = entry.partition("/")
        other = mixture.split("_")[int(source[1]) - 1]
        assert mixture in ids
        assert other != utterance
        assert speaker_of(other) == speaker_of(utterance)
    assert drawn == entries(on_the_fly(toy, sample_rate=8000, mode="max", mixture="mix_both")) == entries(on_disk(tree))
    assert drawn != entries(on_the_fly(toy, enrollment=EnrollmentDraw(seed=1)))


def test_the_draw_is_uniform_and_independent_of_other_targets() -> None:
    pool = {f"a-1-{k}": f"s1/a-1-{k}_b-1-0" for k in range(4)} | {"b-1-0": "s2/a-1-0_b-1-0"}
    targets = [(f"m{number}", "a-1-2") for number in range(3000)]
    drawn = draw(targets, pool, seed=3)
    chosen = [choice.enrollment for choice in drawn.values()]
    counts = [chosen.count(pool[f"a-1-{k}"]) for k in range(4)]
    assert counts[2] == 0
    assert all(abs(counts[k] - 1000) < 4 * np.sqrt(3000 * 2 / 9) for k in (0, 1, 3))
    assert draw(targets[::-7], pool, seed=3) == {key: drawn[key] for key in targets[::-7]}
    assert draw([("m0", "b-1-0")], pool, seed=3) == {}


def test_the_pool_does_not_depend_on_the_order_of_the_mixtures() -> None:
    mixtures = [Mixture("a-1-1_b-1-1", ("a-1-1", "b-1-1")), Mixture("c-1-1_a-1-1", ("c-1-1", "a-1-1"))]
    expected = {"a-1-1": "s1/a-1-1_b-1-1", "b-1-1": "s2/a-1-1_b-1-1", "c-1-1": "s1/c-1-1_a-1-1"}
    assert mixture_pool(mixtures) == mixture_pool(mixtures[::-1]) == expected


def test_a_draw_from_whole_utterances(toy: Toy, tree: Path) -> None:
    enrollment = EnrollmentDraw(pool="librispeech")
    for config in (
        on_the_fly(toy, enrollment=enrollment),
        on_disk(tree, enrollment=enrollment, librispeech_dir=str(toy.librispeech)),
    ):
        trials = open_trials(config).trials
        for trial, (key, entry) in zip(trials, entries(config).items(), strict=True):
            assert trial.enrollment == toy.librispeech / entry
            assert Path(entry).stem != key[1]
            np.testing.assert_array_equal(load_trial(trial, 16000)[2], read_audio(toy.librispeech / entry)[0])
    with pytest.raises(ConfigError, match="librispeech_dir: is required"):
        open_trials(on_disk(tree, enrollment=enrollment))


def test_a_draw_can_be_written_to_a_map(toy: Toy, tmp_path: Path) -> None:
    config = on_the_fly(toy, mixture="mix_both")
    write_map(tmp_path / "map", enrollment_map(config))
    mapped = dataclasses.replace(config, enrollment=EnrollmentMapFile(str(tmp_path / "map")))
    assert open_trials(mapped).trials == open_trials(config).trials
    assert (tmp_path / "map").read_text().splitlines()[0].count(" ") == 2


MIXTURE = "spk000-07-0000_spk001-07-0001"
OTHER = "spk000-07-0001_spk001-07-0002"


def mapped(toy: Toy, path: Path, *lines: str, **changes: Any) -> LibriMixMetadataTrials:
    path.write_text("\n".join(lines) + "\n")
    return on_the_fly(toy, **{"targets": "mapped", "enrollment": EnrollmentMapFile(str(path)), **changes})


@pytest.mark.parametrize("entry", [f"s1/{OTHER}", f"s1/{OTHER}.wav", "test-clean/spk000/07/spk000-07-0001.flac"])
def test_maps_name_sources_or_files(toy: Toy, tmp_path: Path, entry: str) -> None:
    config = mapped(toy, tmp_path / "map", "", f"{MIXTURE}\tspk000-07-0000   {entry}")
    (trial,) = open_trials(config).trials
    assert trial.name == f"{MIXTURE}_s1"
    whole = read_audio(toy.librispeech / "test-clean/spk000/07/spk000-07-0001.flac")[0]
    enrollment = load_trial(trial, 16000)[2]
    assert np.corrcoef(enrollment, whole[: len(enrollment)])[0, 1] > 0.99


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{MIXTURE} spk000-07-0000", "map:2: has 2 fields"),
        (f"{MIXTURE} spk001-07-0001 s2/{OTHER} x", "map:2: has 4 fields"),
        (f"{MIXTURE} spk000-07-0000 s1/{OTHER}", "map:2: spk000-07-0000 in .* appears twice"),
        ("nobody-1-1_x-1-1 nobody-1-1 s1/nobody-1-2_y-1-1", "map:2: mixture 'nobody-1-1_x-1-1' is not in"),
        (f"{MIXTURE} spk003-07-0001 s1/{OTHER}", "map:2: mixture '.*' has no utterance 'spk003-07-0001'"),
        (f"{MIXTURE} spk001-07-0001 s1/{OTHER}", "map:2: the enrollment s1/.* is not from speaker spk001"),
        (f"{MIXTURE} spk001-07-0001 s3/{OTHER}", "map:2: the enrollment s3/.* is not in this LibriMix"),
        (f"{MIXTURE} spk001-07-0001 s1/x-1-1_y-1-1", "map:2: the enrollment s1/x-1-1_y-1-1 is not in"),
        (
            f"{MIXTURE} spk001-07-0001 test-clean/spk001/07/spk001-07-0099.flac",
            r"1 of 2 trials are missing or wrong, .*spk001-07-0099\.flac: no such file",
        ),
    ],
)
def test_bad_lines_of_a_map_are_named_and_counted(toy: Toy, tmp_path: Path, line: str, message: str) -> None:
    config = mapped(toy, tmp_path / "map", f"{MIXTURE} spk000-07-0000 s1/{OTHER}", line)
    with pytest.raises(CorpusError, match=message) as caught:
        open_trials(config)
    assert "\n" not in str(caught.value)
    if "fields" not in message and "twice" not in message:
        opened = open_trials(dataclasses.replace(config, max_missing=0.5))
        assert len(opened.trials) == len(opened.left_out) == 1


def test_an_enrollment_that_is_the_target_itself_is_noted(toy: Toy, tmp_path: Path) -> None:
    config = mapped(toy, tmp_path / "map", f"{MIXTURE} spk001-07-0001 s2/{MIXTURE}")
    opened = open_trials(config)
    assert opened.notes == ["1 of 1 enrollments are the target's own utterance, as the enrollment map says"]
    assert opened.trials[0].enrollment == opened.trials[0].target
    assert "own utterance" in str(export_trials(config, tmp_path / "out"))
    assert open_trials(on_the_fly(toy)).notes == []


def test_a_map_must_name_every_target_unless_targets_is_mapped(toy: Toy, tmp_path: Path) -> None:
    line = f"{MIXTURE} spk000-07-0000 s1/{OTHER}"
    with pytest.raises(CorpusError, match=r"15 of 16 trials .* the enrollment map has no line for it"):
        open_trials(mapped(toy, tmp_path / "map", line, targets="all"))
    with pytest.raises(ConfigError, match="targets: 'mapped' needs an enrollment map"):
        open_trials(on_the_fly(toy, targets="mapped"))
    with pytest.raises(CorpusError, match="cannot be read"):
        read_map(tmp_path / "none")


# ------------------------------------------------------------------ missing files


def test_missing_files_are_skipped_up_to_the_limit(toy: Toy, tmp_path: Path) -> None:
    tree = plain_tree(toy, 2, 16000, "min", tmp_path)
    config = on_disk(tree, targets="first")
    assert open_trials(config).left_out == []
    folder = tree / "wav16k/min/test"
    (folder / "mix_clean" / f"{MIXTURE}.wav").unlink()
    with pytest.raises(CorpusError, match=r"1 of 8 trials .* max_missing = 0\.01 .*: no such file"):
        open_trials(config)
    opened = open_trials(dataclasses.replace(config, max_missing=1 / 8))
    assert len(opened.trials) == 7
    assert [line.split(":")[0] for line in opened.left_out] == [f"{MIXTURE}_s1"]

    wrong = folder / "mix_clean" / f"{OTHER}.wav"
    samples = soundfile.read(wrong)[0]
    for name, text, rate, content in (
        ("rate", "is at 8000 Hz, not 16000 Hz", 8000, samples),
        ("length", f"has {len(samples)} samples, its mixture 1000", 16000, samples[:1000]),
        ("empty", "holds no samples", 16000, samples[:0]),
    ):
        soundfile.write(wrong, content, rate)
        left_out = open_trials(dataclasses.replace(config, max_missing=0.5)).left_out
        assert [line.startswith(f"{OTHER}_s1: ") and text in line for line in left_out[1:]] == [True], name


def test_a_metadata_row_whose_file_is_missing_is_named(toy: Toy, tmp_path: Path) -> None:
    speech = tmp_path / "LibriSpeech"
    shutil.copytree(toy.librispeech, speech)
    (speech / "test-clean/spk000/07/spk000-07-0000.flac").unlink()
    config = dataclasses.replace(on_the_fly(toy), librispeech_dir=str(speech))
    with pytest.raises(CorpusError, match=r"libri2mix\.csv: \d of 16 trials .*spk000-07-0000\.flac: no such file"):
        open_trials(config)
    opened = open_trials(dataclasses.replace(config, max_missing=0.99))
    assert len(opened.trials) + len(opened.left_out) == 16
    assert all("spk000-07-0000.flac" not in str(each.files()) for t in opened.trials for each in audio_of(t))


def audio_of(trial: Trial) -> list[Any]:
    return [trial.mixture, trial.target, trial.enrollment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"librispeech_dir": "/nowhere"}, "/nowhere: no such folder; name the folder of LibriSpeech"),
        ({"mixture": "mix_both", "wham_dir": "/nowhere"}, "/nowhere: no such folder; name the folder wham_noise"),
        ({"mixture": "mix_both", "wham_dir": None}, "mix_both has noise; name the folder wham_noise as wham_dir"),
        ({"metadata": "/nowhere.csv"}, r"/nowhere\.csv: cannot be read"),
    ],
)
def test_missing_folders_are_named_at_once(toy: Toy, change: dict[str, Any], message: str) -> None:
    with pytest.raises((CorpusError, ConfigError), match=message):
        open_trials(dataclasses.replace(on_the_fly(toy), **change))


def test_a_missing_tree_is_named(tree: Path) -> None:
    for changes in ({"mode": "max"}, {"part": "dev"}):
        with pytest.raises(CorpusError, match="no such folder; name a generated LibriMix"):
            open_trials(dataclasses.replace(on_disk(tree), **changes))


# ------------------------------------------------------------------ the lists of WSJ0-2mix

PAIR = "011a0101_1.5_012c0201_-1.5"
KEYS = (f"{PAIR}_011a0109", f"{PAIR}_012c0209")


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Two keys of one mixture, in lists whose paths begin with folders of another machine."""
    rng = np.random.default_rng(0)
    places = {
        "mix": [f"/theirs/2mix/mix/{PAIR}.wav"] * 2,
        "ref": [f"/theirs/2mix/{source}/{PAIR}.wav" for source in ("s1", "s2")],
        "aux": ["/theirs/wsj0/011/011a0109.wav", "/theirs/wsj0/012/012c0209.wav"],
    }
    for name, paths in places.items():
        for path in paths:
            mine = tmp_path / path.replace("/theirs/", "")
            mine.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(mine, 0.1 * rng.standard_normal(4000), 8000)
        lines = [f"{key} {path}" for key, path in zip(KEYS, paths, strict=True)]
        (tmp_path / f"{name}.scp").write_text("\n".join(lines[::-1] if name == "ref" else lines) + "\n")
    return tmp_path


def wsj0(lists: Path, **changes: Any) -> Wsj0Trials:
    replace = {"/theirs/": "/wrong/", "/theirs/2mix": str(lists / "2mix"), "/theirs/wsj0": str(lists / "wsj0")}
    return Wsj0Trials(str(lists), **{"replace": replace, **changes})


def test_both_keys_of_a_mixture_are_trials(lists: Path) -> None:
    opened = open_trials(wsj0(lists))
    mixture = lists / f"2mix/mix/{PAIR}.wav"
    assert opened.trials == [
        Trial(KEYS[0], "011", mixture, lists / "wsj0/011/011a0109.wav", lists / f"2mix/s1/{PAIR}.wav"),
        Trial(KEYS[1], "012", mixture, lists / "wsj0/012/012c0209.wav", lists / f"2mix/s2/{PAIR}.wav"),
    ]
    assert opened.sample_rate == 8000
    assert len(load_trial(opened.trials[0], 8000)[0]) == 4000


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text())) and None


@pytest.mark.parametrize(
    ("spoil", "message", "counted"),
    [
        (edit("ref.scp", lambda text: text.splitlines()[0]), rf"mix\.scp: key '{KEYS[0]}' is not in ref\.scp", True),
        (edit("mix.scp", lambda text: text.splitlines()[0]), rf"ref\.scp: key '{KEYS[1]}' is not in mix\.scp", True),
        (edit("aux.scp", lambda text: text.replace("0209.wav", "0201.wav")), "another enrollment than aux", True),
        (edit("mix.scp", lambda text: f"{text}odd"), r"mix\.scp:3: has no path", False),
        (edit("mix.scp", lambda text: text + text), r"mix\.scp:3: key '.*' appears twice", False),
        (lambda folder: (folder / "aux.scp").unlink(), r"aux\.scp: cannot be read", False),
        (lambda folder: (folder / f"2mix/s2/{PAIR}.wav").unlink(), rf"{KEYS[1]}: .*no such file", True),
    ],
)
def test_bad_lists_are_named(lists: Path, spoil: Callable[[Path], None], message: str, counted: bool) -> None:
    spoil(lists)
    with pytest.raises(CorpusError, match=message):
        open_trials(wsj0(lists))
    if counted:
        assert open_trials(wsj0(lists, max_missing=0.7)).left_out


@pytest.mark.parametrize(
    ("wanted", "message"), [("011a0101", "the target itself"), ("999a0101", "a speaker who is not in the mixture")]
)
def test_contradictory_keys_are_named(lists: Path, wanted: str, message: str) -> None:
    for name in ("mix", "ref", "aux"):
        path = f"/theirs/wsj0/{wanted}.wav" if name == "aux" else f"/theirs/2mix/mix/{PAIR}.wav"
        (lists / f"{name}.scp").write_text(f"{PAIR}_{wanted} {path}\n")
    with pytest.raises(CorpusError, match=message):
        open_trials(wsj0(lists))


def test_files_at_another_rate_are_not_trials(lists: Path) -> None:
    with pytest.raises(CorpusError, match=r"2 of 2 trials .* is at 8000 Hz, not 16000 Hz"):
        open_trials(wsj0(lists, sample_rate=16000))


def test_a_few_samples_are_padded_and_counted(lists: Path) -> None:
    target = lists / f"2mix/s1/{PAIR}.wav"
    write_audio(target, read_audio(target)[0][:-5], 8000)
    opened = open_trials(wsj0(lists))
    [note] = opened.notes
    assert "in 1 of 2 trials, mixture and target differ" in note
    mixture, padded, _ = load_trial(opened.trials[0], 8000)
    assert len(mixture) == len(padded) == 4000
    assert not padded[-5:].any()


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("workers", [1, 2])
def test_exported_trials_equal_the_data_set_bit_for_bit(toy: Toy, tmp_path: Path, workers: int) -> None:
    config = on_the_fly(toy, mixture="mix_both", sample_rate=8000)
    opened = open_trials(config)
    with forked_workers():
        summary = export_trials(config, tmp_path, workers=workers)
    assert summary.trials == len(opened.trials) == 16
    found = {trial.name: trial for trial in find_trials(tmp_path)}
    rows = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    seconds = 0.0
    for trial, row in zip(opened.trials, rows, strict=True):
        assert found[trial.name].speaker == trial.speaker == row["target_speaker"]
        for ours, theirs in zip(load_trial(trial, 8000), load_trial(found[trial.name], 8000), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        seconds += row["samples"] / 8000
    assert [row["enrollment"] for row in rows] == list(entries(config).values())
    assert summary.mixture_seconds == pytest.approx(seconds)
    assert str(summary) == f"16 trials ({seconds / 3600:.2f} h)"


def test_an_interrupted_export_resumes(toy: Toy, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_disk(tree)
    export_trials(config, tmp_path / "whole")
    calls = iter(range(100))

    def until_the_fourth(trial: Trial, rate: int) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return load_trial(trial, rate)

    monkeypatch.setattr("onevoice.trials.export.load_trial", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        export_trials(config, tmp_path / "cut")
    assert len((tmp_path / "cut" / MANIFEST).read_text().splitlines()) == 4
    export_trials(config, tmp_path / "cut")
    assert next(calls) == 17, "only the interrupted trial is made twice"
    assert {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    for other in ({"targets": "first"}, {"enrollment": EnrollmentDraw(seed=1)}):
        with pytest.raises(CorpusError, match="holds a run with other settings"):
            export_trials(dataclasses.replace(config, **other), tmp_path / "cut")


def test_folders_and_lists_are_exported_too(lists: Path, tmp_path: Path) -> None:
    trials = make_trials(tmp_path / "trials", 2)
    export_trials(FolderTrials(str(trials)), tmp_path / "copy")
    for path in trials.glob("*.wav"):
        np.testing.assert_array_equal(read_audio(tmp_path / "copy" / path.name)[0], read_audio(path)[0])
    summary = export_trials(wsj0(lists, limit=1), tmp_path / "wsj0", sample_rate=16000)
    assert summary.trials == 1
    assert soundfile.info(tmp_path / "wsj0" / f"{KEYS[0]}-mixed.wav").samplerate == 16000
    (row,) = map(json.loads, (tmp_path / "wsj0" / MANIFEST).read_text().splitlines())
    assert row["enrollment"] == "011/011a0109.wav"
    for cut in ("segment_seconds", "enrollment_seconds"):
        with pytest.raises(ConfigError, match=f"{cut}.*: trials are written whole"):
            export_trials(FolderTrials(str(trials), **{cut: 0.5}), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


# ------------------------------------------------------------------ folders and evaluation


def test_the_kind_folder_finds_trials(tmp_path: Path) -> None:
    make_trials(tmp_path, 3)
    assert open_trials(FolderTrials(str(tmp_path), limit=2)).trials == find_trials(tmp_path, 2)
    (tmp_path / find_trials(tmp_path)[0].target).unlink()  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="target is missing for 1 of 3 trials"):
        open_trials(FolderTrials(str(tmp_path)))


def test_evaluation_takes_a_data_set(toy: Toy, tmp_path: Path) -> None:
    """Trials on the fly and on disk have the same scores, and skipped trials are reported."""
    torch.manual_seed(0)
    small = SpExPlusConfig(
        sample_rate=8000, filters=16, channels=12, hidden=20, blocks=3, stacks=2, speaker_dim=10, num_classes=5
    )
    extractor = Extractor(SpExPlus(small), Card(small))
    chosen = mapped(
        toy,
        tmp_path / "map",
        f"{MIXTURE} spk000-07-0000 s1/{OTHER}",
        f"{MIXTURE} nobody s1/{OTHER}",
        sample_rate=8000,
        max_missing=0.5,
    )
    options: dict[str, Any] = {"jobs": 1, "metrics": ("si_sdr", "si_sdr_improvement")}
    report = evaluate(extractor, EvaluationConfig(data=chosen, **options), progress=False)
    export_trials(chosen, tmp_path / "disk")
    on_files = evaluate(extractor, EvaluationConfig(folder=str(tmp_path / "disk"), **options), progress=False)
    assert [row.values for row in report.trials] == [row.values for row in on_files.trials]
    assert report.to_dict()["left_out"] == [f"{tmp_path}/map:2: mixture {MIXTURE!r} has no utterance 'nobody'"]
    assert "skipped  1 trials" in format_report(report)
    few = EvaluationConfig(data=dataclasses.replace(chosen, segment_seconds=0.25), limit=1, **options)
    assert [row.seconds for row in evaluate(extractor, few, progress=False).trials] == [0.25]
    for wrong in (EvaluationConfig(), EvaluationConfig(data=chosen, folder="x")):
        with pytest.raises(ConfigError, match="set one of them"):
            evaluate(extractor, wrong)


def test_rendered_audio_of_another_length_is_an_error(toy: Toy, tmp_path: Path) -> None:
    (trial,) = open_trials(mapped(toy, tmp_path / "map", f"{MIXTURE} spk000-07-0000 s1/{OTHER}")).trials
    with pytest.raises(AudioError, match="they must match"):
        load_trial(dataclasses.replace(trial, target=trial.enrollment), 16000)
