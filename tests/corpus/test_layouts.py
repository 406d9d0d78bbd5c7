"""Layouts: the speakers of each kind of corpus, shards read in place, and what can be wrong there."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpora import ids, shard, sound, speak, touch
from voices import Voice

from onevoice.corpus.layouts import detect_layout
from onevoice.corpus.listing import list_corpus, scan_corpus
from onevoice.errors import ConfigError, CorpusError


def test_librispeech_in_full_and_by_part_with_genders(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "LibriSpeech",
        "train-clean-5/84/121123/84-121123-0000.flac",
        "train-clean-5/84/121123/84-121123.trans.txt",
        "train-clean-5/103/1240/103-1240-0001.flac",
        "dev-clean/251/118436/251-118436-0003.flac",
    )
    (root / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET\n84 | F | dev | 8 | M. Name\n103  | M | train | 9 | x\n")
    whole = list_corpus([root])
    assert whole.layouts == ("librispeech",)
    assert ids(whole) == ["103/103-1240-0001", "251/251-118436-0003", "84/84-121123-0000"]
    assert whole.genders == {"84": "female", "103": "male"}
    assert [utterance.recording.name for utterance in whole.utterances][2] == (
        "LibriSpeech/train-clean-5/84/121123/84-121123-0000.flac"
    )
    assert whole.ignored[0][:2] == (1, "without an audio extension")
    assert ids(list_corpus([root / "train-clean-5"])) == ["103/103-1240-0001", "84/84-121123-0000"]
    assert list_corpus([root / "train-clean-5"]).genders == whole.genders
    (root / "SPEAKERS.TXT").unlink()
    assert detect_layout(root / "train-clean-5") == "librispeech"
    assert list_corpus([root / "train-clean-5", root / "dev-clean"]).merged_speakers == 0


def test_vctk_takes_the_first_microphone(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(
            f"wav48_silence_trimmed/{s}/{s}_{n}_mic{m}.flac"
            for s in ("p225", "s5")
            for n in ("001", "002")
            for m in "12"
        ),
        "txt/p225/p225_001.txt",
    )
    (tmp_path / "speaker-info.txt").write_text(
        "ID  AGE  GENDER  ACCENTS\n225  23  F  English Southern\ns5  20 M English\n"
    )
    corpus = list_corpus([tmp_path])
    assert corpus.layouts == ("vctk",)
    assert ids(corpus) == ["p225/p225_001_mic1", "p225/p225_002_mic1", "s5/s5_001_mic1", "s5/s5_002_mic1"]
    assert corpus.genders == {"p225": "female", "s5": "male"}
    assert corpus.ignored[0][0] == 4
    assert ids(list_corpus([tmp_path / "wav48_silence_trimmed"])) == ids(corpus)


def test_voxceleb_ids_hold_the_video_and_m4a_is_a_fault(tmp_path: Path) -> None:
    root = touch(
        tmp_path, *(f"dev/wav/id1000{s}/{video}/00001.wav" for s in "12" for video in ("abc", "xyz")), "vox1_dev.txt"
    )
    (root / "vox1_meta.csv").write_text(
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\nid10001\tA.J._Buckley\tm\tIreland\tdev\n"
    )
    corpus = list_corpus([root])
    assert corpus.layouts == ("voxceleb",)
    assert ids(corpus) == [f"id1000{s}/{video}/00001" for s in "12" for video in ("abc", "xyz")]
    assert corpus.genders == {"id10001": "male"}
    touch(root, "dev/wav/id10003/klm/00001.m4a")
    assert "id10003/klm/00001.m4a: .m4a cannot be decoded; convert it" in str(list_corpus([root]).faults[0])
    with pytest.raises(
        CorpusError, match=r"holds no utterances.*1 files cannot be used, for example.*\.m4a cannot be decoded"
    ):
        list_corpus([touch(tmp_path / "vox2", "dev/aac/id10003/klm/00001.m4a")])


def test_aishell_in_its_three_parts(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"data_aishell/wav/{p}/S000{n}/BAC009S000{n}W0001.wav" for n, p in enumerate(["train", "dev", "test"])),
    )
    touch(tmp_path, "data_aishell/transcript/x.txt", "resource_aishell/lexicon.txt")
    (tmp_path / "resource_aishell" / "speaker.info").write_text("0000 F\n0002 M\n")
    for root in (tmp_path, tmp_path / "data_aishell"):
        corpus = list_corpus([root])
        assert corpus.layouts == ("aishell",)
        assert ids(corpus) == [f"S000{n}/BAC009S000{n}W0001" for n in range(3)]
        assert corpus.genders == {"S0000": "female", "S0002": "male"}
    assert ids(list_corpus([tmp_path / "data_aishell/wav/dev"])) == ["S0001/BAC009S0001W0001"]


def test_any_folder_has_ids_by_path_and_a_layout_can_be_forced(tmp_path: Path) -> None:
    touch(tmp_path, "id10001/a/x.wav", "id10001/b/x.wav", "other/y.flac")
    assert ids(list_corpus([tmp_path])) == ["id10001/a/x", "id10001/b/x"]
    forced = list_corpus([tmp_path], layout="folder", pattern="*.flac")
    assert forced.layouts == ("folder",)
    assert ids(forced) == ["other/y"]
    assert forced.ignored == ((2, "not matching the pattern", f"{tmp_path.name}/id10001/a/x.wav"),)
    flat = list_corpus([tmp_path], layout="flat")
    assert list(flat.speakers) == [tmp_path.name]
    with pytest.raises(ConfigError, match="choose one of librispeech"):
        list_corpus([tmp_path], layout="timit")
    with pytest.raises(CorpusError, match="is a folder, but the layout 'manifest' needs a file; omit --layout"):
        list_corpus([tmp_path], layout="manifest")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifests(tmp_path: Path, kind: str) -> None:
    speak(tmp_path / "deep", "one.wav", "two.wav")
    rows = [
        {"path": "deep/one.wav", "speaker": "ann", "gender": "F", "utterance": "first"},
        {"path": str(tmp_path / "deep" / "two.wav"), "speaker": "bob", "gender": "", "more": "x"},
        {"path": "deep/gone.wav", "speaker": "bob", "gender": "m"},
        {"path": "deep/one.wav", "speaker": ""},
    ]
    path = tmp_path / f"list.{kind}"
    with path.open("w", newline="") as stream:
        if kind == "csv":
            writer = csv.DictWriter(stream, ["path", "speaker", "utterance", "gender", "more"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
            stream.write("{broken\n")
    corpus = scan_corpus([path])
    assert ids(corpus) == ["ann/first", "bob/two"]
    assert corpus.genders == {"ann": "female"}
    broken = {str(fault).split(": ")[0]: fault.reason for fault in corpus.faults}
    assert broken["deep/gone.wav"] == "no such file"
    lines = {name: reason for name, reason in broken.items() if "line" in name}
    assert lines.pop(f"list.{kind}, line {5 if kind == 'csv' else 4}") == "has no speaker"
    assert len(lines) == (kind == "jsonl")
    path.write_text("file,who\nx.wav,ann\n")
    if kind == "csv":
        with pytest.raises(CorpusError, match="has no column 'path'"):
            list_corpus([path])


def test_shards_are_read_in_place_and_share_speakers(tmp_path: Path) -> None:
    first = shard(tmp_path / "a-0.tar", {"./s1/x.flac": sound(1), "s2/y.flac": sound(2, 0.7), "s1/notes.txt": b"hello"})
    second = shard(tmp_path / "a-1.tar", {"s1/z.flac": sound(3, 0.3)})
    corpus = scan_corpus([first, second], decode=True)
    assert ids(corpus) == ["s1/x", "s1/z", "s2/y"]
    assert corpus.merged_speakers == 1
    assert [utterance.seconds for utterance in corpus.utterances] == pytest.approx([0.5, 0.3, 0.7])
    assert corpus.ignored == ((1, "without an audio extension", "a-0.tar:s1/notes.txt"),)
    for number, utterance in zip((1, 3, 2), corpus.utterances, strict=True):
        samples, rate = utterance.recording.read()
        truth = Voice.number(number).say(0, len(samples) / rate)
        np.testing.assert_allclose(samples, truth, atol=1.01 / 32768)
    assert ids(scan_corpus([tmp_path])) == ids(corpus)


def test_a_truncated_shard_keeps_its_complete_members_and_counts_for_as_many(tmp_path: Path) -> None:
    members = {f"s{n}/x.flac": sound(n) for n in range(6)}
    whole = shard(tmp_path / "whole.tar", members)
    assert not list_corpus([whole]).faults
    with tarfile.open(whole) as tar:
        inside, header, border = (
            tar.getmembers()[4].offset_data + 10,
            *(tar.getmembers()[4].offset + n for n in (100, 0)),
        )
    for cut in (inside, header, border):
        corpus = list_corpus([shard(tmp_path / "cut.tar", members, cut)])
        assert ids(corpus) == [f"s{n}/x" for n in range(4)]
        assert str(corpus.faults[0]) == "cut.tar: the shard is truncated after 4 complete members; copy it again"
        assert corpus.broken_share == 0.5
        with pytest.raises(CorpusError, match=r"50.00% of the utterances.*truncated.*--max-broken 0.5"):
            corpus.require_usable(0.01)
        corpus.require_usable(0.5)


def test_faults_in_a_shard_are_named(tmp_path: Path) -> None:
    good = {f"s1/{n:03d}.flac": sound(1) for n in range(3)}
    path = shard(tmp_path / "a.tar", {**good, "lost.flac": sound(), "s1/empty.flac": b"", "s1/text.wav": b"not sound"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("s1/link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "000.flac"
        tar.addfile(link)
    corpus = scan_corpus([path])
    assert len(corpus.utterances) == 3
    broken = {fault.name.removeprefix("a.tar:"): fault.reason for fault in corpus.faults}
    assert "has no speaker" in broken.pop("lost.flac")
    assert "empty" in broken.pop("s1/empty.flac")
    assert "cannot be decoded" in broken.pop("s1/text.wav")
    assert "is a link" in broken.pop("s1/link.flac")
    assert not broken


@pytest.mark.parametrize(
    ("name", "complaint"), [("a.tar.gz", "is compressed"), ("a.tar", "uncompressed tar"), ("a.txt", "no")]
)
def test_a_file_that_is_not_a_corpus(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(b"something else" * 100)
    with pytest.raises(CorpusError, match=complaint):
        list_corpus([tmp_path / name])
    with pytest.raises(CorpusError, match="no such file or folder"):
        list_corpus([tmp_path / "nowhere"])
