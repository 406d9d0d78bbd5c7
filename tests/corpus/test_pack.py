"""Packs: the samples of the files, found by number, and the same bytes for any workers and after any failure."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from corpora import SHARED_SPEECH
from voices import Voice, make_corpus

from onevoice.audio import write_audio
from onevoice.corpus import packing
from onevoice.corpus.listing import Corpus, list_corpus, scan_corpus
from onevoice.corpus.pack import PackedCorpus
from onevoice.corpus.packing import pack_corpus
from onevoice.errors import ConfigError, CorpusError, StorageError

RATE = 8000
FILES = ("samples.int16", "index.npy", "utterances.jsonl", "pack.json")


def contents(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(pack.iterdir())}


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    return pack_corpus(list_corpus([corpus]), tmp_path_factory.mktemp("pack") / "toy", sample_rate=RATE)


def test_every_utterance_equals_its_file_minus_the_mean_to_half_a_step(packed: PackedCorpus, corpus: Path) -> None:
    files = sorted(corpus.glob("*/*/*.flac"))
    assert len(packed) == len(files) == 16
    for number, path in enumerate(sorted(files, key=lambda path: (path.parts[-3], path.relative_to(corpus)))):
        truth, rate = soundfile.read(path)
        assert rate == packed.sample_rate == RATE
        assert packed.ids[number] == path.relative_to(corpus).with_suffix("").as_posix()
        np.testing.assert_allclose(packed.read(number), truth - truth.mean(), atol=0.5001 / 32768)


def test_crops_are_parts_of_the_utterance_and_new_arrays(packed: PackedCorpus) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        utterance = rng.integers(len(packed))
        start, stop = np.sort(rng.integers(0, packed.length[utterance] + 1, 2))
        crop = packed.crop(utterance, start, stop - start)
        assert crop.dtype == np.float32
        np.testing.assert_array_equal(crop, packed.read(utterance)[start:stop])
        crop[:] = 0
        np.testing.assert_array_equal(packed.crop(utterance, start, stop - start), packed.read(utterance)[start:stop])


def test_a_crop_beyond_the_ends_is_an_error(packed: PackedCorpus) -> None:
    whole = int(packed.length[0])
    for start, length in ((-1, 10), (0, whole + 1), (whole, 1), (5, -1)):
        with pytest.raises(ValueError, match="of utterance 0, which has"):
            packed.crop(0, start, length)


def test_each_speaker_is_a_range_of_utterances(packed: PackedCorpus) -> None:
    assert packed.speakers == ("spk000", "spk001", "spk002", "spk003")
    for number, name in enumerate(packed.speakers):
        mine = packed.utterances_of(number)
        assert [packed.ids[utterance].split("/")[0] for utterance in mine] == [name] * 4
        assert (packed.speaker[mine.start : mine.stop] == number).all()
    assert packed.speaker_start.tolist() == [0, 4, 8, 12, 16]
    np.testing.assert_array_equal(packed.offset, np.cumsum(packed.length) - packed.length)
    assert packed.offset.dtype == packed.length.dtype == packed.speaker.dtype == np.int64
    assert packed.samples.dtype == np.int16
    assert len(packed.samples) == packed.length.sum()


def test_a_pickled_pack_holds_only_its_path(packed: PackedCorpus) -> None:
    data = pickle.dumps(packed)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.ids == packed.ids
    np.testing.assert_array_equal(again.crop(3, 17, 100), packed.crop(3, 17, 100))


def test_the_number_of_workers_does_not_change_a_byte(packed: PackedCorpus, corpus: Path, tmp_path: Path) -> None:
    other = pack_corpus(list_corpus([corpus]), tmp_path / "other", sample_rate=RATE, workers=2)
    assert tuple(sorted(contents(other.path))) == tuple(sorted(FILES))
    assert contents(other.path) == contents(packed.path)
    assert not list(tmp_path.glob("*.part"))


KILLED = """
    import os, signal, sys
    from onevoice.corpus import packing
    from onevoice.corpus.listing import list_corpus

    def main():
        corpus, out, place, workers = sys.argv[1:]
        name, count = place.split(":")
        original, calls = getattr(packing, name), 0

        def killing(*args):
            nonlocal calls
            calls += 1
            if calls == int(count):
                if name == "append_whole":
                    stream, data = args
                    original(stream, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(packing, name, killing)
        packing.pack_corpus(list_corpus([corpus]), out, sample_rate=8000, workers=int(workers))

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(
    ("place", "workers"),
    [
        ("_row:1", 1),
        ("append_whole:4", 1),  # halfway through the samples of the fourth utterance
        ("_row:12", 2),
        ("_write_index:1", 1),
        ("to_json:1", 1),  # everything but the header is written
    ],
)
def test_a_killed_pack_is_started_over_and_has_the_same_bytes(
    place: str, workers: int, packed: PackedCorpus, corpus: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    out, part = tmp_path / "toy", tmp_path / "toy.part"
    arguments = [sys.executable, str(script), str(corpus), str(out), place, str(workers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(arguments, env=environment, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CorpusError, match="is not a complete packed corpus"):
        PackedCorpus.open(part)
    (part / ".index.npy.123.part").write_bytes(b"left by a killed write")
    again = pack_corpus(list_corpus([corpus]), out, sample_rate=RATE)
    assert contents(again.path) == contents(packed.path)
    assert not part.exists()


def test_an_identical_pack_is_left_alone(
    packed: PackedCorpus, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = record_jobs(monkeypatch)
    first = pack_corpus(list_corpus([corpus]), tmp_path / "toy", sample_rate=RATE)
    assert encoded == list(packed.ids)
    times = [path.stat().st_mtime_ns for path in sorted(first.path.iterdir())]
    encoded.clear()
    assert pack_corpus(list_corpus([corpus]), tmp_path / "toy", sample_rate=RATE).ids == first.ids
    assert encoded == []
    assert [path.stat().st_mtime_ns for path in sorted(first.path.iterdir())] == times


def record_jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the id of each job as it is encoded."""
    encoded: list[str] = []
    original = packing._Encoder.__call__
    monkeypatch.setattr(packing._Encoder, "__call__", lambda self, job: encoded.append(job.id) or original(self, job))
    return encoded


def test_a_full_disk_leaves_nothing_behind(packed: PackedCorpus, corpus: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"samples\.int16: cannot be written"):
            pack_corpus(list_corpus([corpus]), tmp_path / "toy", sample_rate=RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    again = pack_corpus(list_corpus([corpus]), tmp_path / "toy", sample_rate=RATE)
    assert contents(again.path) == contents(packed.path)


def test_a_folder_that_holds_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    listed = list_corpus([corpus])
    pack_corpus(listed, tmp_path / "toy", sample_rate=RATE)
    with pytest.raises(CorpusError, match=r"toy: holds another pack; choose another folder"):
        pack_corpus(listed, tmp_path / "toy", sample_rate=16000)
    for folder in ("notes", "new.part"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"notes: holds something other than a pack"):
        pack_corpus(listed, tmp_path / "notes", sample_rate=RATE)
    with pytest.raises(CorpusError, match=r"new\.part/text\.txt: is in the way of packing; move it"):
        pack_corpus(listed, tmp_path / "new", sample_rate=RATE)
    assert (tmp_path / "new.part" / "text.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert len(pack_corpus(listed, tmp_path / "empty", sample_rate=RATE)) == 16


def test_verify_finds_and_names_damage(packed: PackedCorpus, tmp_path: Path) -> None:
    packed.verify()
    for name, data in contents(packed.path).items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "samples.int16").open("r+b") as stream:
        stream.seek(2 * int(packed.offset[5]))
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorpusError, match=f"is damaged .first in {packed.ids[5]}"):
        PackedCorpus.open(tmp_path).verify()
    os.truncate(tmp_path / "samples.int16", 1000)
    with pytest.raises(CorpusError, match=r"samples.int16: has 1000 bytes instead of"):
        PackedCorpus.open(tmp_path)
    for header in ("{}", '{"format": 1, "sample_rate": 8000}', "not JSON"):
        (tmp_path / "pack.json").write_text(header)
        with pytest.raises(CorpusError, match="is not a complete packed corpus"):
            PackedCorpus.open(tmp_path)
    (tmp_path / "pack.json").write_text('{"format": 2, "sha256": {}}')
    with pytest.raises(CorpusError, match="has the format 2, not 1; pack the corpus again"):
        PackedCorpus.open(tmp_path)
    with pytest.raises(CorpusError, match="is not a complete packed corpus"):
        PackedCorpus.open(tmp_path / "nowhere")


def odd_corpus(root: Path) -> Path:
    """Speaker a: DC offset, 44.1 kHz stereo, silence, text; speaker b: 20 good files."""
    make_corpus(root, speakers=1, utterances=20, seconds=0.3)
    speech = Voice.number(1).say(0, 1.0)
    write_audio(root / "a" / "dc.wav", speech + np.float32(0.4), RATE, subtype="FLOAT")
    stereo = np.stack([Voice.number(1).say(1, 1.0, 44100), np.zeros(44100, np.float32)], axis=1)
    soundfile.write(root / "a" / "stereo.wav", stereo, 44100, subtype="FLOAT")
    write_audio(root / "a" / "silent.wav", np.full(RATE, 0.25, np.float32), RATE)
    (root / "a" / "text.wav").write_text("this is not audio")
    return root


def test_means_are_removed_rates_converted_and_broken_files_left_out(tmp_path: Path) -> None:
    listed = list_corpus([odd_corpus(tmp_path / "odd")])
    with pytest.raises(CorpusError, match=r"of the utterances are broken.*a/silent.wav: is silent"):
        pack_corpus(listed, tmp_path / "pack", sample_rate=RATE)
    assert not (tmp_path / "pack").exists()
    packed = pack_corpus(listed, tmp_path / "pack", sample_rate=RATE, max_broken=0.1)
    assert packed.ids[:2] == ("a/dc", "a/stereo")
    speech = Voice.number(1).say(0, 1.0).astype(np.float64)
    np.testing.assert_allclose(packed.read(0), speech - speech.mean(), atol=0.51 / 32768)
    stereo = soxr.resample(Voice.number(1).say(1, 1.0, 44100) / 2, 44100, RATE)
    np.testing.assert_allclose(packed.read(1), stereo - stereo.mean(), atol=0.51 / 32768)
    faults = {row["id"]: row["fault"] for row in packed.rows() if "fault" in row}
    assert set(faults) == {"a/silent", "a/text"}
    assert "is silent" in faults["a/silent"]
    assert "cannot be decoded" in faults["a/text"]
    assert packed.header["left_out"] == 2
    assert packed.header["source_rates"] == {"8000": 21, "44100": 1}
    assert "1 converted from other rates); 2 left out" in packed.summary()
    kept = pack_corpus(listed, tmp_path / "kept", sample_rate=RATE, max_broken=0.1, keep_mean=True)
    np.testing.assert_allclose(kept.read(0), speech + 0.4, atol=0.51 / 32768)


def test_each_speed_is_another_speaker_of_the_same_person(tmp_path: Path) -> None:
    for name, frequency in (("high", 400.0), ("low", 200.0)):
        tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)
        for take in "ab":
            write_audio(tmp_path / "tones" / name / f"{take}.wav", tone.astype(np.float32), RATE)
    packed = pack_corpus(list_corpus([tmp_path / "tones"]), tmp_path / "pack", sample_rate=RATE, speeds=(0.8, 1.25))
    assert packed.speakers == ("high", "high@0.8", "high@1.25", "low", "low@0.8", "low@1.25")
    assert packed.person_of_speaker.tolist() == [0, 0, 0, 1, 1, 1]
    assert packed.ids[:4] == ("high/a", "high/b", "high@0.8/a", "high@0.8/b")
    assert packed.speaker_start.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert packed.length[:6].tolist() == [RATE, RATE, 10_000, 10_000, 6_400, 6_400]
    for speaker, frequency in enumerate((400, 320, 500, 200, 160, 250)):
        for number in packed.utterances_of(speaker):
            spectrum = np.abs(np.fft.rfft(packed.read(number)))
            assert spectrum.argmax() * RATE / packed.length[number] == pytest.approx(frequency, abs=1)


def test_the_limit_also_counts_faults_found_before_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 recordings: one is a duplicate, and packing finds two that are broken."""
    root = odd_corpus(tmp_path / "odd")
    (root / "spk000" / "00" / "spk000-00-0000.wav").write_bytes(b"the same id again")
    listed = list_corpus([root])
    assert len(listed.faults) == 1
    encoded = record_jobs(monkeypatch)
    with pytest.raises(CorpusError, match=r"8\.00% of the utterances"):
        pack_corpus(listed, tmp_path / "early", sample_rate=RATE, max_broken=0.05)
    assert len(encoded) < 4  # it gives up before the speaker spk000
    with pytest.raises(CorpusError, match=r"12\.00% of the utterances"):
        pack_corpus(listed, tmp_path / "pack", sample_rate=RATE, max_broken=0.119, speeds=(0.9,))
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    pack_corpus(listed, tmp_path / "pack", sample_rate=RATE, max_broken=0.12, speeds=(0.9,))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"speeds": (1.0,)}, "speeds"),
        ({"speeds": (0.9, 0.9)}, "speeds"),
        ({"speeds": (3.0,)}, "speeds"),
        ({"sample_rate": 16}, "sample_rate: 16 Hz"),
    ],
)
def test_settings_out_of_range(options: dict[str, object], complaint: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pack_corpus(list_corpus([corpus]), tmp_path / "pack", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_gender_and_shards_reach_the_pack(corpus: Path, tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            for path in sorted(corpus.glob("*/*/*.flac"))[number::2]:
                tar.add(path, f"{path.parts[-3]}/{path.name}")
    listed = list_corpus([tmp_path], genders={"spk001": "female", "spk003": "male"})
    packed = pack_corpus(listed, tmp_path / "out" / "pack", sample_rate=RATE)
    assert packed.genders == (None, "female", None, "male")
    from_files = pack_corpus(list_corpus([corpus]), tmp_path / "out" / "files", sample_rate=RATE)
    by_name = {name.split("/")[-1]: from_files.read(number) for number, name in enumerate(from_files.ids)}
    for number, name in enumerate(packed.ids):
        np.testing.assert_array_equal(packed.read(number), by_name[name.split("/")[-1]])


@pytest.mark.skipif(not SHARED_SPEECH.is_dir(), reason="the real recordings are missing")
def test_real_recordings(tmp_path: Path) -> None:
    """Crops of a pack of real speech are the decoded files, to half a step of 16 bits."""
    full = scan_corpus([SHARED_SPEECH / "dev.tar"])
    some = Corpus(full.layouts, full.utterances[::45])
    packed = pack_corpus(some, tmp_path / "pack")
    assert len(packed) == len(some.utterances) == 6
    with tarfile.open(SHARED_SPEECH / "dev.tar") as tar:
        for number, utterance in enumerate(some.utterances):
            member = tar.extractfile(utterance.recording.name.removeprefix("dev.tar:"))
            assert member is not None
            truth, rate = soundfile.read(member)
            assert rate == packed.sample_rate == 16000
            start, length = len(truth) // 3, len(truth) // 2
            truth = (truth - truth.mean())[start : start + length]
            np.testing.assert_allclose(packed.crop(number, start, length), truth, atol=0.501 / 32768)


def test_rows_and_arrays_agree(packed: PackedCorpus) -> None:
    rows = list(packed.rows())
    assert [row["samples"] for row in rows] == packed.length.tolist()
    names = [name for name, _ in itertools.groupby(row["speaker"] for row in rows)]
    assert names == [speaker for speaker, _, _ in json.loads((packed.path / "pack.json").read_text())["speakers"]]
