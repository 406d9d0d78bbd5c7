"""Trials from disk: finding them in folders, and cutting, ordering and padding them by rule."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from voices import make_trials

from onevoice.audio import read_audio, write_audio
from onevoice.errors import AudioError, CorpusError
from onevoice.trials import FolderTrials, open_trials
from onevoice.trials.reading import EpochSampler, Item, TrialDataset, collate, find_trials, pad, read_batches

KINDS = {"mixed": "mix", "ref": "refs", "target": "targets"}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trials(tmp_path_factory.mktemp("trials"), 6)


@pytest.fixture
def copy(trials: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trials, tmp_path / "copy"))


def files_of(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*-{kind}.wav"))


def test_the_flat_layout(trials: Path) -> None:
    found = find_trials(trials)
    assert [trial.mixture for trial in found] == files_of(trials, "mixed")
    assert [trial.enrollment for trial in found] == files_of(trials, "ref")
    assert [trial.target for trial in found] == files_of(trials, "target")
    assert [trial.name for trial in found] == [path.stem.removesuffix("-mixed") for path in files_of(trials, "mixed")]
    assert [trial.speaker for trial in found] == [trial.name.split("_")[0] for trial in found]


@pytest.mark.parametrize("with_endings", [True, False])
def test_the_layout_with_folders(trials: Path, tmp_path: Path, with_endings: bool) -> None:
    for kind, folder in KINDS.items():
        (tmp_path / folder).mkdir()
        for path in files_of(trials, kind):
            shutil.copy(path, tmp_path / folder / (path.name if with_endings else path.name.replace(f"-{kind}", "")))
    found, flat = find_trials(tmp_path), find_trials(trials)
    assert [(trial.name, trial.speaker) for trial in found] == [(trial.name, trial.speaker) for trial in flat]
    for kind, folder in (("mixture", "mix"), ("enrollment", "refs"), ("target", "targets")):
        for a, b in zip(found, flat, strict=True):
            assert getattr(a, kind).parent == tmp_path / folder
            assert getattr(a, kind).read_bytes() == getattr(b, kind).read_bytes()


def test_the_manifest_names_the_speakers(copy: Path) -> None:
    """The name of a speaker may contain an underscore."""
    names = [trial.name for trial in find_trials(copy)]
    rows = [json.dumps({"name": name, "target_speaker": f"a_{index}"}) for index, name in enumerate(names[:-1])]
    (copy / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    speakers = [trial.speaker for trial in find_trials(copy)]
    assert speakers == [*(f"a_{index}" for index in range(5)), names[-1].split("_")[0]]


@pytest.mark.parametrize("line", ['{"name": "x", "targ', '{"name": "x"}', "3", "[]", ""])
def test_a_damaged_manifest_is_an_error(copy: Path, line: str) -> None:
    (copy / "manifest.jsonl").write_text(f'{{"name": "a", "target_speaker": "b"}}\n{line}\n')
    with pytest.raises(CorpusError, match=r"manifest\.jsonl: line 2 is not a row of `onevoice mix`"):
        find_trials(copy)


def test_limit_takes_the_first_by_name(trials: Path) -> None:
    assert find_trials(trials, 2) == find_trials(trials)[:2]


def test_other_files_in_the_folder_are_ignored(copy: Path) -> None:
    before = find_trials(copy)
    for name in ("notes.txt", "x-mixed.txt", ".a-mixed.wav.123.part", "x.wav"):
        (copy / name).write_bytes(b"x")
    assert find_trials(copy) == before


@pytest.mark.parametrize(("kind", "word"), [("ref", "enrollment"), ("target", "target")])
def test_a_missing_file_is_named(copy: Path, kind: str, word: str) -> None:
    lost = files_of(copy, kind)[2]
    lost.unlink()
    name = lost.stem.removesuffix(f"-{kind}")
    with pytest.raises(CorpusError, match=f"the {word} is missing for 1 of 6 trials, first '{name}'; add"):
        find_trials(copy)


def in_folders(trials: Path, folder: Path, rename: dict[str, str]) -> Path:
    """Copy trials to mix/, refs/ and targets/, with other names: `{number}` is the place of a trial in sorted order."""
    for kind, name in KINDS.items():
        (folder / name).mkdir(parents=True)
        for number, path in enumerate(files_of(trials, kind)):
            stem = path.stem.removesuffix(f"-{kind}")
            shutil.copy(path, folder / name / f"{rename.get(kind, '{stem}').format(number=number, stem=stem)}.wav")
    return folder


def test_files_without_common_names_are_paired_in_sorted_order(trials: Path, tmp_path: Path) -> None:
    rename = {"mixed": "m{number}", "ref": "r{number}", "target": "{stem}"}
    folder = in_folders(trials, tmp_path / "renamed", rename)
    flat, opened = find_trials(trials), open_trials(FolderTrials(str(folder)))
    assert [trial.name for trial in opened.trials] == [f"m{number}" for number in range(6)]
    assert [trial.speaker for trial in opened.trials] == [trial.speaker for trial in flat]  # by the names of targets
    for ours, theirs in zip(opened.trials, flat, strict=True):
        for kind in ("mixture", "enrollment", "target"):
            assert getattr(ours, kind).read_bytes() == getattr(theirs, kind).read_bytes()
    enrollment, target = opened.notes
    assert (
        "no enrollment has the name of its mixture (expected refs/m0.wav); 6 are paired in sorted order" in enrollment
    )
    assert "first m0.wav with r0.wav" in enrollment
    assert "no target has the name of its mixture (expected targets/m0.wav)" in target
    assert open_trials(FolderTrials(str(trials))).notes == []


def test_other_counts_or_some_common_names_are_an_error_with_the_expected_name(trials: Path, tmp_path: Path) -> None:
    folder = in_folders(trials, tmp_path / "fewer", {"ref": "r{number}"})
    (folder / "refs" / "r5.wav").unlink()
    name = find_trials(trials)[0].name
    with pytest.raises(
        CorpusError, match=rf"missing for 6 of 6 trials, first '{name}'; add .*expected refs/{name}\.wav"
    ):
        find_trials(folder)
    folder = in_folders(trials, tmp_path / "one", {})
    (folder / "targets" / f"{name}.wav").rename(folder / "targets" / "other.wav")
    with pytest.raises(CorpusError, match=rf"the target is missing for 1 of 6 .*expected targets/{name}\.wav"):
        find_trials(folder)


def test_pairs_of_other_speakers_are_refused(trials: Path, tmp_path: Path) -> None:
    """Names of the original system begin with the numbers of target and interferer."""
    folder = in_folders(
        trials, tmp_path, {"mixed": "1{number}_20_m", "target": "1{number}_20_t", "ref": "1{number}_20_r"}
    )
    assert [trial.speaker for trial in find_trials(folder)] == [f"1{number}" for number in range(6)]
    (folder / "targets" / "13_20_t.wav").rename(folder / "targets" / "13_21_t.wav")
    with pytest.raises(CorpusError, match="mixture '13_20_m' meets target '13_21_t', which names other speakers"):
        find_trials(folder)


@pytest.mark.parametrize("samples", [7920, 7999, 8001, 8080])
def test_a_few_samples_are_padded_and_counted(copy: Path, samples: int) -> None:
    path = files_of(copy, "target")[1]
    whole = read_audio(path)[0]
    write_audio(path, np.resize(whole, samples), 8000)
    opened = open_trials(FolderTrials(str(copy)))
    [note] = opened.notes
    assert f"in 1 of 6 trials, mixture and target differ by up to 0.01 s; .* (first {opened.trials[1].name!r})" in (
        note.replace("the shorter one is padded with zeros", ".*")
    )
    item = TrialDataset(opened.trials, 8000)[0, 1]
    assert len(item.mixture) == len(item.target) == max(8000, samples)
    assert not item.target[samples:].any()
    assert not item.mixture[8000:].any()
    np.testing.assert_allclose(item.target[:7920], whole[:7920], atol=1e-4)


def test_a_target_at_another_rate_is_not_counted_as_padded(copy: Path) -> None:
    path = files_of(copy, "target")[1]
    write_audio(path, read_audio(path, 16_000)[0], 16_000)
    assert open_trials(FolderTrials(str(copy))).notes == []


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no trials; expected NAME-mixed"):
        find_trials(tmp_path)
    with pytest.raises(CorpusError, match="no such folder of trials"):
        find_trials(tmp_path / "none")


def test_uncut_items_equal_the_files(trials: Path) -> None:
    found = find_trials(trials)
    data = TrialDataset(found, 8000, speakers=("spk001", "spk002"))
    assert len(data) == 6
    for index, trial in enumerate(found):
        item = data[7, index]
        assert item.name == trial.name
        assert item.speaker == {"spk001": 0, "spk002": 1}.get(trial.speaker, -1)
        for got, path in (
            (item.mixture, trial.mixture),
            (item.target, trial.target),
            (item.enrollment, trial.enrollment),
        ):
            np.testing.assert_array_equal(got, read_audio(path)[0])


def test_other_rates_are_converted(copy: Path) -> None:
    for rate in (16_000, 4000):
        item = TrialDataset(find_trials(copy), rate)[0, 0]
        assert (len(item.mixture), len(item.target), len(item.enrollment)) == (rate, rate, rate * 3 // 2)
    path = files_of(copy, "ref")[0]
    write_audio(path, read_audio(path, 16_000)[0], 16_000)  # one file at another rate than its neighbors
    item = TrialDataset(find_trials(copy), 8000, segment_seconds=0.5)[0, 0]
    assert (len(item.mixture), len(item.enrollment)) == (4000, 12_000)


def place(part: np.ndarray, whole: np.ndarray) -> int:
    """Return the index in `whole` where the samples `part` begin."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
    (found,) = np.flatnonzero((windows == part).all(axis=1))
    return int(found)


def test_cuts_depend_only_on_seed_epoch_and_name(trials: Path) -> None:
    found = find_trials(trials)
    data = TrialDataset(found, 8000, segment_seconds=0.1, enrollment_seconds=0.2, seed=3)
    fewer = TrialDataset(found[2:4], 8000, segment_seconds=0.1, enrollment_seconds=0.2, seed=3)
    other_seed = TrialDataset(found, 8000, segment_seconds=0.1, enrollment_seconds=0.2, seed=4)
    starts = set()
    for epoch in range(4):
        item, again, elsewhere = data[epoch, 3], data[epoch, 3], fewer[epoch, 1]
        for other in (again, elsewhere):
            np.testing.assert_array_equal(item.mixture, other.mixture)
            np.testing.assert_array_equal(item.enrollment, other.enrollment)
        start = place(item.mixture, read_audio(found[3].mixture)[0])
        assert place(item.target, read_audio(found[3].target)[0]) == start
        assert (len(item.mixture), len(item.enrollment)) == (800, 1600)
        starts |= {start, place(other_seed[epoch, 3].mixture, read_audio(found[3].mixture)[0])}
    assert len(starts) == 8


def test_short_trials_are_not_cut(trials: Path) -> None:
    item = TrialDataset(find_trials(trials), 8000, segment_seconds=5.0, enrollment_seconds=1.5)[0, 0]
    assert (len(item.mixture), len(item.enrollment)) == (8000, 12_000)


@pytest.mark.parametrize(
    ("kind", "samples", "complaint"),
    [
        ("target", np.ones(7900, np.float32) / 2, r"-target\.wav: has 7900 samples, its mixture 8000"),
        ("mixed", np.zeros(8000, np.float32), r"-mixed\.wav: is silent"),
        ("ref", np.full(8000, 0.25, np.float32), r"-ref\.wav: is silent"),
    ],
)
def test_unusable_trials_are_named(copy: Path, kind: str, samples: np.ndarray, complaint: str) -> None:
    write_audio(files_of(copy, kind)[1], samples, 8000)
    data = TrialDataset(find_trials(copy), 8000, segment_seconds=0.5)
    assert data[0, 0].name
    with pytest.raises(AudioError, match=complaint):
        data[0, 1]


def test_a_silent_target_is_allowed(copy: Path) -> None:
    write_audio(files_of(copy, "target")[1], np.zeros(8000, np.float32), 8000)
    assert not TrialDataset(find_trials(copy), 8000)[0, 1].target.any()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_from_any_process(copy: Path, workers: int) -> None:
    path = files_of(copy, "mixed")[1]
    path.write_bytes(path.read_bytes()[:3000])
    sampler = EpochSampler(6, 2, 0, 0, shuffle=False)
    loader = DataLoader(
        TrialDataset(find_trials(copy), 8000), batch_sampler=sampler, collate_fn=collate, num_workers=workers
    )
    with pytest.raises(AudioError) as error:
        list(read_batches(loader))
    assert str(error.value).startswith(f"{path}: truncated")
    assert "\n" not in str(error.value)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))


@given(SIZES)
def test_an_epoch_has_each_trial_once(sizes: tuple[int, int, int, int]) -> None:
    size, batch, seed, epoch = sizes
    batches = list(EpochSampler(size, batch, seed, epoch))
    flat = [index for keys in batches for _, index in keys]
    assert {key[0] for keys in batches for key in keys} == {epoch}
    assert len(set(flat)) == len(flat)
    dropped = size % batch if size > batch else 0
    assert len(flat) == size - dropped
    assert all(len(keys) == min(batch, size) for keys in batches)
    assert len(EpochSampler(size, batch, seed, epoch)) == len(batches)


@given(SIZES, st.integers(0, 40), st.booleans())
def test_a_resumed_epoch_continues_with_the_remaining_batches(
    sizes: tuple[int, int, int, int], start: int, shuffle: bool
) -> None:
    size, batch, seed, epoch = sizes
    whole = list(EpochSampler(size, batch, seed, epoch, shuffle=shuffle))
    assert list(EpochSampler(size, batch, seed, epoch, start, shuffle=shuffle)) == whole[start:]


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(map(tuple, EpochSampler(50, 1, seed, 0))) for seed in range(3)}
    indices = {tuple(keys[0][1] for keys in EpochSampler(50, 1, 0, epoch)) for epoch in range(3)}
    assert len(orders) == len(indices) == 3


def test_without_shuffling_all_trials_come_in_order() -> None:
    assert list(EpochSampler(5, 2, 0, 9, shuffle=False)) == [[(9, 0), (9, 1)], [(9, 2), (9, 3)], [(9, 4)]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_padding_adds_zeros_at_the_end(lengths: list[int]) -> None:
    signals = [np.arange(1, length + 1, dtype=np.float32) for length in lengths]
    padded, length = pad(signals)
    assert padded.shape == (len(lengths), max(lengths))
    assert length.tolist() == lengths
    for row, signal in zip(padded, signals, strict=True):
        assert torch.equal(row, torch.from_numpy(np.pad(signal, (0, max(lengths) - len(signal)))))


def test_collate() -> None:
    items = [
        Item("a", np.ones(5, np.float32), np.full(5, 2, np.float32), np.full(3, 3, np.float32), 1),
        Item("b", np.ones(4, np.float32), np.full(4, 2, np.float32), np.full(7, 3, np.float32), -1),
    ]
    batch = collate(items)
    assert (batch["audio"].shape, batch["target"].shape, batch["ref"].shape) == ((2, 5), (2, 5), (2, 7))
    assert (batch["audio_length"].tolist(), batch["ref_length"].tolist()) == ([5, 4], [3, 7])
    assert (batch["speaker"].tolist(), batch["name"]) == ([1, -1], ["a", "b"])
    assert (batch["audio"].sum(), batch["target"].sum(), batch["ref"].sum()) == (9, 18, 30)
