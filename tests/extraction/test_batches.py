"""Several recordings through the network at once, as on an accelerator."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction.test_windows import difference_db, extractor_of, recording
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL_CONFIGS
from voices import Voice

from onevoice.audio import read_audio, write_audio
from onevoice.cluster import Cluster
from onevoice.errors import CheckpointError, ConfigError
from onevoice.extraction import jobs, windows
from onevoice.extraction.batches import BATCH_SECONDS, GROUP, MAX_PADDING, by_length
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.jobs import Failure, Job, Settings, jobs_together, run_jobs
from onevoice.extraction.recording import Extraction, extract_files
from onevoice.extraction.request import Request

LENGTHS = (8000, 5000, 7000, 7999, 6400)
"""The second one is too short for the batch of the others."""


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 700), max_size=30))
def test_groups_hold_all_with_little_padding_and_bounded_sound(lengths: dict[int, int]) -> None:
    groups = by_length(lengths, 1)
    assert sorted(key for group in groups for key in group) == sorted(lengths)
    for group, after in zip(groups, [*groups[1:], None], strict=False):
        longest = max(lengths[key] for key in group)
        assert min(lengths[key] for key in group) >= (1 - MAX_PADDING) * longest
        assert len(group) * longest <= BATCH_SECONDS or len(group) == 1
        if after is not None:  # the next one did not fit
            full = (len(group) + 1) * longest > BATCH_SECONDS
            assert full or lengths[after[0]] < (1 - MAX_PADDING) * longest


@pytest.fixture
def extractor(request: pytest.FixtureRequest) -> Extractor:
    """The band-split network, or the one that the test is parametrized with."""
    extractor = extractor_of(SMALL_CONFIGS[getattr(request, "param", "bandsplit")])
    extractor.takes_batches = True
    return extractor


@pytest.fixture
def batches(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of mixtures that the network gets at once."""
    found: list[int] = []
    extract = extractor.model.extract

    def counted(audio: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        found.append(len(audio))
        return extract(audio, *arguments, **options)

    monkeypatch.setattr(extractor.model, "extract", counted)
    return found


def singly(extractor: Extractor, sound: np.ndarray, voice: Any) -> np.ndarray:
    return np.asarray(extractor.extract(sound, 8000, voice))


@pytest.mark.parametrize("extractor", sorted(SMALL_CONFIGS), indirect=True)
def test_a_list_gives_what_each_gives_alone(
    extractor: Extractor, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them silence, and a recording that is too long for one window."""
    monkeypatch.setattr(windows, "EXACT_CORE_SECONDS", 2.0)
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 6.0)
    sounds = [recording(2.0)[:length] for length in LENGTHS] + [np.zeros(8000, np.float32), recording(12.0)]
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    assert windows.make_plan(extractor.card.config, len(sounds[-1])).count > 1
    together = extractor.extract(sounds, 8000, voice)
    assert batches[0] == 5
    assert set(batches[1:]) == {1}
    for ours, sound in zip(together, sounds, strict=True):
        alone = singly(extractor, sound, voice)
        assert ours.shape == sound.shape
        assert np.abs(ours - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("extractor", sorted(SMALL_CONFIGS), indirect=True)
def test_each_recording_of_a_batch_has_its_own_voice(extractor: Extractor, batches: list[int], tmp_path: Path) -> None:
    requests, expected = [], []
    for number in range(3):
        voice = extractor.enroll(Voice.number(number).say(2, 2.0), 8000)
        write_audio(tmp_path / f"{number}.wav", recording(1.0), 8000)
        sound, _ = read_audio(tmp_path / f"{number}.wav")
        requests.append(Request(tmp_path / f"{number}.wav", voice, tmp_path / f"out{number}.wav"))
        expected.append(singly(extractor, sound, voice))
    batches.clear()
    results = extract_files(extractor, requests)
    assert batches == [3]
    for request, result, want in zip(requests, results, expected, strict=True):
        assert isinstance(result, Extraction)
        assert result.output == str(request.output)
        np.testing.assert_allclose(read_audio(request.output)[0], want, atol=1e-6)
    assert difference_db(expected[1], expected[0]) > -60  # so a mixed-up voice would be seen


def test_a_batch_without_memory_goes_on_one_by_one(
    extractor: Extractor, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = extractor.model.extract

    refused = []

    def small(audio: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        if len(audio) > 1:
            refused.append(len(audio))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return extract(audio, *arguments, **options)

    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    sounds = [recording(1.0), recording(1.0, offset=0.1)]
    expected = [singly(extractor, sound, voice) for sound in sounds]
    batches.clear()
    monkeypatch.setattr(extractor.model, "extract", small)
    together = extractor.extract(sounds, 8000, voice)
    assert (refused, batches) == ([2], [1, 1])
    for ours, alone in zip(together, expected, strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_a_bad_request_does_not_stop_the_others(extractor: Extractor, batches: list[int], tmp_path: Path) -> None:
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    foreign = extractor_of(SMALL_CONFIGS["spexplus"])
    for name in ("a", "b", "c"):
        write_audio(tmp_path / f"{name}.wav", recording(1.0), 8000)
    requests = [
        Request(tmp_path / "a.wav", voice, tmp_path / "a.out.wav"),
        Request(tmp_path / "gone.wav", voice, tmp_path / "gone.out.wav"),
        Request(tmp_path / "b.wav", foreign.enroll(recording(2.0), 8000), tmp_path / "b.out.wav"),
        Request(tmp_path / "c.wav", voice, tmp_path / "c.out.wav", tmp_path / "rest.wav"),
    ]
    batches.clear()
    first, gone, wrong, last = extract_files(extractor, requests)
    assert batches == [2]
    assert isinstance(first, Extraction)
    assert isinstance(last, Extraction)
    assert "gone.wav: no such file" in str(gone)
    assert isinstance(wrong, CheckpointError)
    assert sorted(path.name for path in tmp_path.glob("*.out.wav")) == ["a.out.wav", "c.out.wav"]
    total = read_audio(tmp_path / "c.out.wav")[0] + read_audio(tmp_path / "rest.wav")[0]
    np.testing.assert_allclose(total, read_audio(tmp_path / "c.wav")[0], atol=1e-6)


def test_long_recordings_go_by_themselves_and_are_reported(
    extractor: Extractor, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "EXACT_CORE_SECONDS", 2.0)
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 6.0)
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    for name, seconds in (("a", 1.0), ("long", 12.0), ("b", 1.0)):
        write_audio(tmp_path / f"{name}.wav", recording(seconds), 8000)
    requests = [Request(tmp_path / f"{name}.wav", voice, tmp_path / f"{name}.out.wav") for name in ("a", "long", "b")]
    batches.clear()
    shares: list[float] = []
    results = extract_files(extractor, requests, shares.append)
    assert batches.pop() == 2
    assert set(batches) == {1}
    assert len(shares) > 3
    assert (shares, shares[-1]) == (sorted(shares), 1.0)
    outputs = [result.output for result in results if isinstance(result, Extraction)]
    assert outputs == [str(request.output) for request in requests]


def test_two_requests_for_one_output(extractor: Extractor, tmp_path: Path) -> None:
    """As on a processor, the second one is refused, unless it may replace what is there."""
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    write_audio(tmp_path / "a.wav", recording(1.0), 8000)
    write_audio(tmp_path / "b.wav", recording(1.0, offset=0.1)[::-1].copy(), 8000)
    requests = [Request(tmp_path / f"{name}.wav", voice, tmp_path / "new" / "out.wav") for name in ("a", "b")]
    first, second = extract_files(extractor, requests)
    assert isinstance(first, Extraction)
    assert "out.wav: exists" in str(second)
    kept = (tmp_path / "new" / "out.wav").read_bytes()
    again = extract_files(extractor, [replace(request, force=True) for request in requests])
    assert all(isinstance(result, Extraction) for result in again)
    assert (tmp_path / "new" / "out.wav").read_bytes() != kept


def test_many_requests_are_held_in_groups(
    extractor: Extractor, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onevoice.extraction.recording.GROUP", 2)
    monkeypatch.setattr("onevoice.extraction.extractor.GROUP", 2)
    voice = extractor.enroll(Voice.number(0).say(2, 2.0), 8000)
    write_audio(tmp_path / "a.wav", recording(1.0), 8000)
    batches.clear()
    extract_files(extractor, [Request(tmp_path / "a.wav", voice, tmp_path / f"{number}.wav") for number in range(5)])
    assert batches == [2, 2, 1]
    batches.clear()
    extractor.extract([recording(1.0)] * 5, 8000, voice)
    assert batches == [2, 2, 1]


# Jobs -----------------------------------------------------------------------------------------------------------


def write_jobs(folder: Path, count: int) -> list[Job]:
    write_audio(folder / "voice.wav", Voice.number(0).say(2, 2.0), 8000)
    for number in range(count):
        write_audio(folder / f"{number}.wav", recording(1.0), 8000)
    names = [str(folder / f"{number}") for number in range(count)]
    return [Job(f"{name}.wav", str(folder / "voice.wav"), f"{name}.out.wav") for name in names]


def test_jobs_go_in_groups_and_keep_their_order(extractor: Extractor, batches: list[int], tmp_path: Path) -> None:
    todo = write_jobs(tmp_path, 5)
    todo[1] = Job("gone.wav", todo[1].voice, todo[1].output)
    found = list(run_jobs(todo, lambda: extractor, Settings(), together=3))
    assert [job for job, _ in found] == todo
    assert [isinstance(result, Failure) for _, result in found] == [False, True, False, False, False]
    assert batches == [2, 2]


def test_a_group_that_takes_down_its_workers_is_tried_one_by_one(
    extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = write_jobs(tmp_path, 4)
    lost: list[int] = []

    def mortal(
        make_work: Callable[[], Callable[[Any], Any]],
        items: Iterable[Any],
        workers: Any,
        set_aside: Callable[[Any, str], Any],
    ) -> Generator[Any, None, None]:
        """A cluster on which job 1 is deadly."""
        work = make_work()
        for item in items:
            if todo[1] in item:
                lost.append(len(item))
                yield set_aside(item, "took down its worker")
            else:
                yield work(item)

    monkeypatch.setattr(jobs, "ordered_map", mortal)
    found = list(run_jobs(todo, lambda: extractor, Settings(), Cluster(gpus=1), together=2))
    assert [job for job, _ in found] == [todo[2], todo[3], todo[0], todo[1]]
    assert lost == [2, 1]
    assert [isinstance(result, Failure) for _, result in found] == [False, False, False, True]
    assert found[3][1] == Failure(todo[1], f"{todo[1].mixture}: took down its worker")


def test_only_accelerators_take_jobs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_together("cpu", 1, 10**6) == 1
    assert jobs_together("auto", Cluster(), 10**6) == 1
    assert jobs_together("cuda", Cluster(gpus=1), 10**6) == GROUP
    assert jobs_together("cuda", Cluster(workers=2, gpus=1), 64) == 8
    assert jobs_together("cuda", Cluster(gpus=1), 3) == 1
    with pytest.raises(ConfigError, match="device: torch finds no device 'tpu9'"):
        jobs_together("tpu9", 1, 9)
    monkeypatch.setattr(jobs, "pick_device", torch.device)
    assert jobs_together("cuda:1", 1, 10**6) == GROUP
