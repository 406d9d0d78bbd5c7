"""Runs of the generator: what they write, whatever the number of workers, the interruption or the damage."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora import shard
from tiny import full_disk
from voices import Voice, make_corpus

from onevoice.audio import read_audio
from onevoice.cli import main
from onevoice.corpus.listing import Speaker, scan
from onevoice.errors import ConfigError, CorpusError, StorageError
from onevoice.mixing.folder import MANIFEST, SETTINGS, SKIPPED
from onevoice.mixing.generator import MixingSummary, MixtureGenerator
from onevoice.mixing.law import SHORT_REFERENCE, SHORT_UTTERANCE, SILENT_FILE, UNREADABLE

RATE = 8000
Folder = dict[str, bytes]


def generate(
    corpus: Path, out: Path, count: int = 12, seed: int = 1, test: bool = False, **options: object
) -> MixingSummary:
    generator = MixtureGenerator(scan(corpus), out, nfiles=count, test=test, randomState=seed, sample_rate=RATE)
    return generator.generate_mixes(**{"num_workers": 1, "audioLen": 1, **options})


def content(folder: Path) -> Folder:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(folder: Path, name: str = MANIFEST) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 training trials, never interrupted, by one process."""
    out = tmp_path_factory.mktemp("made")
    generate(corpus, out)
    return out


def test_names_and_formats_of_the_original(made: Path, corpus: Path, tmp_path: Path) -> None:
    for row in rows_of(made):
        name = f"{row['target_speaker']}_{row['interferer_speaker']}_{row['index']:06d}_{row['segment']}"
        assert row["name"] == name
        infos = [soundfile.info(made / f"{name}{suffix}") for suffix in ("-mixed.wav", "-target.wav", "-ref.wav")]
        assert {(info.samplerate, info.channels, info.subtype) for info in infos} == {(RATE, 1, "PCM_16")}
        assert [info.frames for info in infos] == [RATE, RATE, row["enrollment_samples"]]
    assert len(list(made.glob("*.wav"))) == 3 * len(rows_of(made))
    generate(corpus, tmp_path, count=3, test=True)
    names = {row["name"] for row in rows_of(tmp_path)}
    assert {name.count("_") for name in names} == {2}
    assert {path.name.rsplit("-", 1)[0] for path in tmp_path.glob("*.wav")} == names


def test_the_manifest_records_how_each_file_was_made(corpus: Path, tmp_path: Path) -> None:
    """Recordings, gains and positions of a row reproduce the written files up to 16-bit rounding."""
    generate(corpus, tmp_path, vad_db=None)
    for row in rows_of(tmp_path):
        parts = []
        for kind in ("target", "interferer", "enrollment"):
            samples, _ = read_audio(corpus / row[kind], RATE)
            parts.append((samples - samples.mean()) * 10 ** (row[f"{kind}_gain_db"] / 20))
        span = slice(row["start"], row["start"] + row["samples"])
        written = {kind: read_audio(tmp_path / f"{row['name']}-{kind}.wav")[0] for kind in ("mixed", "target", "ref")}
        step = 1 / 32768
        np.testing.assert_allclose(written["target"], parts[0][span], atol=step)
        np.testing.assert_allclose(written["mixed"] - written["target"], parts[1][span], atol=1.6 * step)
        np.testing.assert_allclose(written["ref"], parts[2], atol=step)
        assert row["enrollment"] != row["target"]
        assert row["enrollment"].split("/")[0] == row["target"].split("/")[0] == row["target_speaker"]


def test_rows_are_in_order_and_complete(made: Path) -> None:
    rows = rows_of(made)
    places = [(row["index"], row["segment"]) for row in rows]
    assert places == sorted(places)
    assert {row["index"] for row in rows} == set(range(12))
    record = json.loads((made / SETTINGS).read_text())
    assert record["summary"]["mixtures"] == len(rows)
    assert record["summary"]["trials"] == record["trials"] == 12
    assert record["summary"]["mixture_seconds"] == len(rows)


@pytest.mark.parametrize("workers", [2, 3])
def test_same_bytes_for_any_number_of_workers(made: Path, corpus: Path, tmp_path: Path, workers: int) -> None:
    generate(corpus, tmp_path, num_workers=workers)
    assert content(tmp_path) == content(made)


def test_the_order_of_speakers_and_files_does_not_matter(made: Path, corpus: Path, tmp_path: Path) -> None:
    backwards = [Speaker(speaker.id, speaker.files[::-1]) for speaker in scan(corpus)][::-1]
    MixtureGenerator(backwards, tmp_path, 12, randomState=1, sample_rate=RATE).generate_mixes(num_workers=1, audioLen=1)
    assert content(tmp_path) == content(made)


def as_shard(corpus: Path, folder: Path) -> Path:
    files = sorted(corpus.rglob("*.flac"), reverse=True)  # the order in the shard does not matter
    return shard(folder / "all.tar", {path.relative_to(corpus).as_posix(): path.read_bytes() for path in files})


def as_manifest(corpus: Path, folder: Path) -> Path:
    rows = [f"{path},{path.relative_to(corpus).parts[0]}" for path in corpus.rglob("*.flac")]
    (folder / "all.csv").write_text("\n".join(["path,speaker", *rows]))
    return folder / "all.csv"


def as_links(corpus: Path, folder: Path) -> Path:
    """The parts of LibriSpeech, under a folder with its table of speakers; names of speakers are numbers there."""
    for number, speaker in enumerate(sorted(corpus.iterdir())):
        (folder / "top" / f"part{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "top" / f"part{number % 2}" / f"{number}").symlink_to(speaker)
    (folder / "top" / "SPEAKERS.TXT").write_text("0 | F\n")
    return folder / "top"


def sounds(folder: Path) -> Folder:
    """The written files; speakers have the numbers of `as_links`."""
    return {name.replace("spk00", ""): data for name, data in content(folder).items() if name.endswith(".wav")}


@pytest.mark.parametrize("place", [as_shard, as_manifest, as_links])
def test_shards_manifests_and_layouts_give_the_trials_of_the_folder(
    made: Path, corpus: Path, tmp_path: Path, place: Callable[[Path, Path], Path]
) -> None:
    (tmp_path / "corpus").mkdir()
    source = place(corpus, tmp_path / "corpus")
    generate(source, tmp_path / "out", num_workers=2 if place is as_shard else 1)
    assert sounds(tmp_path / "out") == sounds(made)
    if place is as_shard:
        expected = [f"all.tar:{row['target']}" for row in rows_of(made)]
        assert [row["target"] for row in rows_of(tmp_path / "out")] == expected


def test_the_command_mixes_several_corpora(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two speakers in a shard and two in a folder, and a file that is left out."""
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for number, speaker in enumerate(sorted(corpus.iterdir())):
        parts[number % 2].mkdir(exist_ok=True)
        (parts[number % 2] / speaker.name).symlink_to(speaker)
    (parts[0] / "other").mkdir()
    (parts[0] / "other" / "talk.m4a").touch()
    members = {f"{path.parts[-3]}/{path.name}": path.read_bytes() for path in sorted(parts[1].glob("*/*/*.flac"))}
    tar = shard(tmp_path / "part1.tar", members)
    options = ["--count", "8", "--seed", "1", "--workers", "1", "--sample-rate", str(RATE), "--segment-seconds", "1"]
    main(["mix", str(parts[0]), str(tar), str(tmp_path / "out"), *options])
    printed = capsys.readouterr()
    assert "8 of 8 trials" in printed.out
    assert "\r" not in printed.err, "a progress bar without a terminal"
    assert "left out: 1 files, the first: part0/other/talk.m4a" in printed.err
    used = {row[kind] for row in rows_of(tmp_path / "out") for kind in ("target_speaker", "interferer_speaker")}
    assert used == {"spk000", "spk001", "spk002", "spk003"}


def test_another_seed_is_another_set(made: Path, corpus: Path, tmp_path: Path) -> None:
    generate(corpus, tmp_path, seed=2)
    assert content(tmp_path).keys() != content(made).keys()


def cut_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:-700])


def cut_everything(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != SETTINGS:
            path.unlink()


def lose_files(folder: Path) -> None:
    mixtures = sorted(folder.glob("*-mixed.wav"))
    mixtures[2].unlink()
    mixtures[9].write_bytes(mixtures[9].read_bytes()[:1000])
    (folder / f".{mixtures[2].name}.123.part").write_bytes(b"half")


def damage_a_row(folder: Path) -> None:
    path = folder / MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:7], b'{"index": 3, "na\n', *lines[8:]]))


@pytest.mark.parametrize("damage", [cut_manifest, cut_everything, lose_files, damage_a_row])
def test_a_damaged_folder_is_repaired(made: Path, corpus: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for name, data in content(made).items():
        (tmp_path / name).write_bytes(data)
    damage(tmp_path)
    assert generate(corpus, tmp_path) == MixingSummary(**json.loads((made / SETTINGS).read_text())["summary"])
    assert content(tmp_path) == content(made)


def test_a_complete_run_is_not_written_again(made: Path, corpus: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in made.glob("*.wav")}
    generate(corpus, made)
    assert {path.name: path.stat().st_mtime_ns for path in made.glob("*.wav")} == before


RUN = """
import sys
from onevoice.corpus.listing import scan
from onevoice.mixing.generator import MixtureGenerator
if __name__ == "__main__":
    corpus, out, workers = sys.argv[1:]
    generator = MixtureGenerator(scan(corpus), out, nfiles=50, test=False, randomState=1, sample_rate=8000)
    generator.generate_mixes(num_workers=int(workers), audioLen=1)
"""


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in /proc")
@pytest.mark.parametrize(("workers", "ending"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_run_resumes_to_the_same_bytes(
    corpus_with_faults: Path, whole: dict[str, bytes], tmp_path: Path, workers: int, ending: signal.Signals
) -> None:
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(corpus_with_faults), str(out), str(workers)]
    kept = 0
    for rows in (3, 6):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while process.poll() is None and lines_in(out / MANIFEST) < kept + rows:
                time.sleep(0.002)
            children = children_of(process.pid)
            process.send_signal(ending)
            process.communicate()
        assert process.returncode == -ending, "ended before it was killed"
        assert len(children) == (0 if workers == 1 else workers + 1)
        while any(is_running(child) for child in children):
            time.sleep(0.01)
        kept = lines_in(out / MANIFEST)
        assert kept >= rows
        assert json.loads((out / SETTINGS).read_text())["summary"] is None
    generate(corpus_with_faults, out, count=50)
    assert content(out) == whole


@pytest.fixture(scope="module")
def whole(corpus_with_faults: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    generate(corpus_with_faults, folder, count=50)
    return content(folder)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def corpus_with_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good speakers whose folders also hold every kind of unusable file."""
    root = make_corpus(tmp_path_factory.mktemp("faulty"), speakers=3, utterances=4, seconds=3.0)
    folder = root / "spk000"
    (folder / "text.wav").write_text("this is not sound\n")
    (folder / "empty.flac").touch()
    soundfile.write(folder / "nan.wav", np.full(RATE * 3, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "zeros.wav", np.zeros(RATE * 3, np.float32), RATE)
    soundfile.write(folder / "short.wav", Voice.number(0).say(9, 0.5, RATE), RATE)
    whole = (root / "spk001" / "00" / "spk001-00-0000.flac").read_bytes()
    (root / "spk001" / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    return root


def test_broken_files_are_replaced_and_named(corpus_with_faults: Path, tmp_path: Path) -> None:
    summary = generate(corpus_with_faults, tmp_path, count=60)
    assert summary.trials == summary.asked == 60
    assert summary.given_up == 0
    named = {f"spk000/{name}" for name in ("text.wav", "empty.flac", "nan.wav", "zeros.wav")}
    assert set(summary.unusable) == {*named, "spk001/truncated.flac"}
    assert "NaN" in summary.unusable["spk000/nan.wav"]
    assert set(summary.replaced) == {UNREADABLE, SILENT_FILE, SHORT_REFERENCE, SHORT_UTTERANCE}
    skipped = rows_of(tmp_path, SKIPPED)
    assert len(skipped) == sum(summary.replaced.values())
    used = {row[kind] for row in rows_of(tmp_path) for kind in ("target", "interferer", "enrollment")}
    assert not used & ({*summary.unusable} | {"spk000/short.wav"})
    line = str(summary)
    assert "\n" not in line
    for text in ("60 of 60 trials", UNREADABLE, SILENT_FILE, SHORT_REFERENCE, "5 unusable files"):
        assert text in line


def test_trials_that_cannot_be_drawn_are_given_up(tmp_path: Path) -> None:
    """Only speaker `a` can be a target, and only one of their two files is long enough; the run still ends."""
    for name, seconds in (("a/long1", 3), ("a/long2", 0.8), ("b/only", 3)):
        path = tmp_path / "corpus" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, Voice.number(ord(name[0])).say(0, seconds, RATE), RATE)
    with pytest.raises(CorpusError, match=r"no mixture could be made; 0 of 2 trials.*2 trials given up") as caught:
        generate(tmp_path / "corpus", tmp_path / "out", count=2)
    assert SHORT_REFERENCE in str(caught.value)
    with pytest.raises(CorpusError, match="2 trials given up"):
        generate(tmp_path / "corpus", tmp_path / "out", count=2)


@pytest.mark.parametrize(
    ("speakers", "complaint"),
    [
        ([], "0 speakers"),
        ([Speaker("a", (Path("x"), Path("y")))], "1 speakers"),
        ([Speaker("a", (Path("x"), Path("y"))), Speaker("b", ())], "1 speakers"),
        ([Speaker("a", (Path("x"),)), Speaker("b", (Path("y"),))], "no speaker has 2 files"),
        ([Speaker("a", (Path("x"), Path("x"))), Speaker("b", (Path("y"),))], "no speaker has 2 files"),
        ([Speaker("a", (Path("x"), Path("y")))] * 2, "appears twice"),
        ([Speaker("a/b", (Path("x"), Path("y"))), Speaker("b", (Path("z"),))], "cannot be part of a file name"),
    ],
)
def test_too_few_speakers_are_refused_at_once(tmp_path: Path, speakers: list[Speaker], complaint: str) -> None:
    with pytest.raises(CorpusError, match=complaint):
        MixtureGenerator(speakers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_object_with_id_and_files_is_a_speaker(corpus: Path, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class LibriSpeechSpeakerFiles:
        id: str
        files: list[str]

    speakers = [LibriSpeechSpeakerFiles(each.id, [str(file) for file in each.files]) for each in scan(corpus)]
    generator = MixtureGenerator(speakers_files=speakers, out_folder=str(tmp_path), nfiles=1, test=True, randomState=3)
    summary = generator.generate_mixes(
        snr_levels=[0, 5], num_workers=1, update_steps=10, trim_db=20, vad_db=20, audioLen=3
    )
    assert summary.trials == 1
    assert rows_of(tmp_path)[0]["sample_rate"] == 16000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seed": 9}, "seed was 1 and is now 9"),
        ({"vad_db": None}, "vad_db was 20.0 and is now None"),
        ({"count": 13}, "trials was 12 and is now 13"),
    ],
)
def test_a_folder_with_another_run_is_refused(made: Path, corpus: Path, options: dict, complaint: str) -> None:
    before = content(made)
    with pytest.raises(CorpusError, match=complaint):
        generate(corpus, made, **options)
    assert content(made) == before


def test_a_folder_with_another_corpus_is_refused(made: Path, corpus_with_faults: Path) -> None:
    with pytest.raises(CorpusError, match="corpus_digest"):
        generate(corpus_with_faults, made)


def test_a_corpus_may_move_but_not_change(made: Path, corpus: Path, tmp_path: Path) -> None:
    out, moved = (Path(shutil.copytree(*pair)) for pair in ((made, tmp_path / "out"), (corpus, tmp_path / "moved")))
    next(out.glob("*-mixed.wav")).unlink()
    generate(moved, out)
    assert sounds(out) == sounds(made)
    changed = next(moved.rglob("*.flac"))
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(CorpusError, match="corpus_digest"):
        generate(moved, out)


@pytest.mark.parametrize("name", [MANIFEST, SETTINGS])
def test_a_folder_with_something_else_is_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(CorpusError, match="choose another folder"):
        generate(corpus, tmp_path)
    assert content(tmp_path) == {name: b"[]"}


@pytest.mark.parametrize(("workers", "size"), [(1, 10_000), (2, 10_000), (1, 70_000)])
def test_a_full_disk_is_one_clear_error_and_the_run_can_resume(
    made: Path, corpus: Path, tmp_path: Path, workers: int, size: int
) -> None:
    with full_disk(size), pytest.raises(StorageError, match=r"cannot be written \(File too large\)"):
        generate(corpus, tmp_path, num_workers=workers, **({"count": 400} if size > 10_000 else {}))
    assert not list(tmp_path.glob(".*"))
    assert all(data.endswith(b"\n") for name, data in content(tmp_path).items() if name.endswith("jsonl") and data)
    if size == 10_000:
        generate(corpus, tmp_path)
        assert content(tmp_path) == content(made)


def test_out_folder_that_is_a_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        generate(corpus, tmp_path / "file" / "out")


@pytest.mark.parametrize("options", [{"count": 0}, {"num_workers": 0}, {"update_steps": 0}, {"audioLen": 0}])
def test_options_out_of_range(corpus: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        generate(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_import_is_light() -> None:
    code = "import sys, onevoice.mixing.generator; sys.exit(bool({'torch', 'scipy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
