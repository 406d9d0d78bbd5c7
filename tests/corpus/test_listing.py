"""Listings: which speakers are found and in which order, how much speech there is, and what is broken."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import RATE, SHARED_SPEECH, ids, shard, sound, speak, touch

from onevoice.audio import write_audio
from onevoice.cli.data import corpus_app
from onevoice.corpus.layouts import read_genders
from onevoice.corpus.listing import Speaker, describe, list_corpus, scan, scan_corpus, split_speakers
from onevoice.corpus.pack import PackedCorpus
from onevoice.errors import ConfigError, CorpusError


def found(root: Path, pattern: str | None = None) -> dict[str, list[str]]:
    return {
        speaker.id: [path.relative_to(root / speaker.id).as_posix() for path in speaker.files]
        for speaker in scan(root, pattern)
    }


def test_librispeech_layout(corpus: Path) -> None:
    speakers = scan(corpus)
    assert [speaker.id for speaker in speakers] == ["spk000", "spk001", "spk002", "spk003"]
    assert all(len(speaker.files) == 4 for speaker in speakers)
    assert speakers[0].files[0] == corpus / "spk000" / "00" / "spk000-00-0000.flac"


def test_any_depth_and_any_known_extension(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.wav", "b/deep/er/y.FLAC", "a/z.opus", "a/1.mp3", "a/notes.txt", "c/readme.md", "top.txt")
    assert found(tmp_path) == {"a": ["1.mp3", "z.opus"], "b": ["deep/er/y.FLAC", "x.wav"]}


def test_hidden_names_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.wav", "a/._x.wav", "a/.cache/y.wav", ".git/z.wav")
    assert found(tmp_path) == {"a": ["x.wav"]}


def test_pattern_is_matched_at_the_end_of_the_path(tmp_path: Path) -> None:
    touch(tmp_path, "a/x-norm.wav", "a/x.wav", "b/clean/x.wav", "b/noisy/x.wav", "b/x-norm.txt")
    assert found(tmp_path, "*-norm.wav") == {"a": ["x-norm.wav"]}
    assert found(tmp_path, "clean/*.wav") == {"b": ["clean/x.wav"]}


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{speaker}/{chapter}/{name}.wav" for speaker in "cab" for chapter in "21" for name in "zyx"))
    before = scan(tmp_path)

    class Backwards(list[os.DirEntry[str]]):
        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None: ...

    original = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Backwards(sorted(original(path), key=lambda e: e.name)[::-1]))
    assert scan(tmp_path) == before


def test_links_to_folders_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "x.wav", "more/y.wav")
    root = touch(tmp_path / "root", "b/z.wav")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "elsewhere")
    assert found(root) == {"a": ["more/y.wav", "x.wav"], "b": ["z.wav"]}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "holds no utterances in the layout 'folder'; put one folder per speaker there"),
        (["x.wav", "y.wav"], "put one folder per speaker there"),
        (["a/notes.txt"], r"1 files without an audio extension \(.*/a/notes.txt"),
        (["a/talk.m4a"], r"\.m4a cannot be decoded; convert it"),
    ],
)
def test_a_folder_that_is_not_a_corpus(tmp_path: Path, names: list[str], complaint: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(CorpusError, match=complaint) as caught:
        scan(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder_file_and_unmatched_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.wav")
    with pytest.raises(CorpusError, match="no such file or folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"is not a corpus; name a folder, a \.tar, or a manifest"):
        scan(tmp_path / "a" / "x.wav")
    with pytest.raises(CorpusError, match=r"1 files not matching the pattern \(.*/a/x.wav"):
        scan(tmp_path, "*-norm.wav")


def test_the_top_folder_of_librispeech_and_shards(tmp_path: Path) -> None:
    touch(tmp_path / "top", "SPEAKERS.TXT", "dev-clean/84/1/84-1-0001.flac", "test-clean/61/2/61-2-0001.flac")
    assert [speaker.id for speaker in scan(tmp_path / "top")] == ["61", "84"]
    members = scan(shard(tmp_path / "x.tar", {"b/2.flac": sound(), "b/1.flac": sound(), "a/1.flac": sound()}))
    assert [(speaker.id, [file.name for file in speaker.files]) for speaker in members] == [
        ("a", ["x.tar:a/1.flac"]),
        ("b", ["x.tar:b/1.flac", "x.tar:b/2.flac"]),
    ]


def test_speaker_is_a_value() -> None:
    assert Speaker("a", (Path("x"),)) == Speaker("a", (Path("x"),))
    assert len({Speaker("a", (Path("x"),)), Speaker("a", (Path("x"),))}) == 1


def test_duplicate_names(tmp_path: Path) -> None:
    """A name used by two speakers makes two utterances; a duplicate id is left out and named."""
    touch(tmp_path / "a", "s1/x.wav", "s2/x.wav", "s1/x.flac")
    corpus = list_corpus([tmp_path / "a"])
    assert ids(corpus) == ["s1/x", "s2/x"]
    assert corpus.shared_names == 1
    assert str(corpus.faults[0]) == "a/s1/x.wav: duplicate of the utterance s1/x, already found as a/s1/x.flac"
    one, two = (shard(tmp_path / f"{n}.tar", {"s1/y.flac": sound(n)}) for n in (1, 2))
    twice = list_corpus([two, one])
    assert [utterance.recording.path for utterance in twice.utterances] == [two]
    assert len(twice.faults) == 1
    with pytest.raises(CorpusError, match=r"1.tar and .*a: both have a speaker 's1'"):
        list_corpus([one, tmp_path / "a"])


def test_inspecting_finds_lengths_rates_and_faults_for_any_number_of_workers(tmp_path: Path) -> None:
    speak(tmp_path, *(f"s{n % 3}/{n:03d}.wav" for n in range(150)))
    speak(tmp_path, "s1/other.flac", sample_rate=16000)
    whole = (tmp_path / "s1" / "other.flac").read_bytes()
    (tmp_path / "s1" / "middle.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "s2" / "002.wav").write_bytes((tmp_path / "s2" / "005.wav").read_bytes()[:2000])
    write_audio(tmp_path / "s0" / "silent.wav", np.zeros(RATE, np.float32), RATE)
    quick = scan_corpus([tmp_path])
    assert [fault.name.split("/", 1)[1] for fault in quick.faults] == ["s2/002.wav"]
    assert "truncated" in quick.faults[0].reason
    thorough = scan_corpus([tmp_path], decode=True)
    assert [fault.name.split("/", 1)[1] for fault in thorough.faults] == [
        "s0/silent.wav",
        "s1/middle.flac",
        "s2/002.wav",
    ]
    assert scan_corpus([tmp_path], decode=True, workers=2) == thorough
    assert Counter(utterance.sample_rate for utterance in thorough.utterances) == {RATE: 149, 16000: 1}
    assert thorough.seconds == pytest.approx(75.0)
    assert thorough.broken_share == pytest.approx(3 / 153)
    text = describe(thorough, max_faults=2)
    for line in ("hours         0.02", "8000 Hz × 149, 16000 Hz × 1", "left out      3 (1.96%", "… and 1 more"):
        assert line in text
    with pytest.raises(CorpusError, match=r"1\.96%"):
        thorough.require_usable(0.01)


def test_a_table_of_genders_overrides_the_corpus(tmp_path: Path) -> None:
    table = tmp_path / "who.csv"
    table.write_text("speaker,age,gender\ns1,30,Female\ns2,,M\ns3,,\n")
    assert read_genders(table) == {"s1": "female", "s2": "male"}
    corpus = list_corpus([touch(tmp_path / "c", "s1/x.wav", "s3/x.wav")], genders=read_genders(table))
    assert corpus.genders == {"s1": "female"}
    table.write_text("speaker,age\ns1,30\n")
    with pytest.raises(CorpusError, match="has no speaker's gender"):
        read_genders(table)


def test_splits_are_disjoint_and_complete_and_speakers_keep_their_part() -> None:
    names = [f"speaker {n}" for n in range(2000)]
    parts = split_speakers(names, {"train": 0.8, "validation": 0.15, "test": 0.05}, seed=3)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert [len(part) / 2000 for part in parts.values()] == pytest.approx([0.8, 0.15, 0.05], abs=0.03)
    fewer = split_speakers(names[::-2], {"train": 0.8, "validation": 0.15, "test": 0.05}, seed=3)
    for part, members in fewer.items():
        assert set(members) <= set(parts[part])
    other = split_speakers(names, {"train": 0.8, "validation": 0.15, "test": 0.05}, seed=4)
    assert other != parts


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_bad_fractions(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        split_speakers(["x", "y"], fractions, 0)
    with pytest.raises(CorpusError, match="no speaker fell into the part 'few'"):
        split_speakers(["x", "y"], {"many": 0.999999, "few": 0.000001}, 0)


def command(*arguments: object) -> None:
    corpus_app([str(argument) for argument in arguments], exit_on_error=False, result_action="return_value")


def test_the_commands(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("scan", corpus, "--workers", 1)
    assert "speakers      4 (4 unknown)\nutterances    16\n" in capsys.readouterr().out
    split = ["--split", "train=0.5", "validation=0.5", "--seed", 1]
    command("pack", corpus, tmp_path / "out", *split, "--sample-rate", RATE, "--workers", 1, "--verify")
    out = capsys.readouterr().out.splitlines()
    packs = [PackedCorpus.open(tmp_path / "out" / part) for part in ("train", "validation")]
    assert out == [pack.summary() for pack in packs]
    assert sorted(name for pack in packs for name in pack.speakers) == [f"spk{n:03d}" for n in range(4)]
    command("verify", tmp_path / "out" / "train")
    assert capsys.readouterr().out.splitlines() == out[:1]
    for wrong in (["--split", "train"], ["--split", "a/b=1"], ["--split", "a=x"], ["--split", "a=0.5", "a=0.5"]):
        with pytest.raises(ConfigError, match=r"--split"):
            command("pack", corpus, tmp_path / "wrong", *wrong)
    with pytest.raises(ConfigError, match="name the sources and then the folder"):
        command("pack", tmp_path / "wrong")
    with pytest.raises(ConfigError, match="name a corpus"):
        command("scan")


def test_scan_prints_the_report_and_fails_with_too_many_broken_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speak(tmp_path, "s1/a.wav", "s1/b.wav", "s2/c.wav")
    (tmp_path / "s2" / "d.wav").write_text("no sound")
    with pytest.raises(CorpusError, match=r"25\.00% of the utterances .*s2/d.wav: cannot be decoded"):
        command("scan", tmp_path, "--workers", 1)
    assert "s2/d.wav: cannot be decoded" in capsys.readouterr().out
    command("scan", tmp_path, "--workers", 1, "--max-broken", 0.25)


@pytest.mark.skipif(not SHARED_SPEECH.is_dir(), reason="the real recordings are missing")
def test_real_recordings_agree_with_their_table() -> None:
    with (SHARED_SPEECH / "utterances.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["shard"] == "train-0.tar"]
    corpus = scan_corpus([SHARED_SPEECH / "train-0.tar"], genders=read_genders(SHARED_SPEECH / "utterances.csv"))
    assert sorted(ids(corpus)) == sorted(f"{row['speaker']}/{row['utterance']}" for row in rows)
    assert not corpus.faults
    seconds = {utterance.id: utterance.seconds for utterance in corpus.utterances}
    for row in rows:
        assert seconds[f"{row['speaker']}/{row['utterance']}"] == pytest.approx(float(row["seconds"]), abs=0.002)
    genders = {row["speaker"]: row["gender"] for row in rows if row["gender"]}
    assert {name: gender[0] for name, gender in corpus.genders.items()} == {k: v[0].lower() for k, v in genders.items()}
