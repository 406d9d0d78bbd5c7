"""Shards: parts of the work by commands of their own, joined by the same command without --shard."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import Outcome, command, save_tiny

from onevoice.audio import write_audio
from onevoice.errors import ConfigError
from onevoice.evaluation.results import read_result
from onevoice.files import Shard, parse_shard, shard_path, shard_paths, sole_writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_item_is_in_one_shard() -> None:
    parts = [Shard(number, 3).of(range(10)) for number in (1, 2, 3)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert {len(part) for part in parts} == {3, 4}
    assert (parse_shard(None), parse_shard("2/3")) == (None, Shard(2, 3))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "a/b", "-1/3", "1/3/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="is no shard; give I/N, from 1/N to N/N"):
        parse_shard(text)


def test_names_of_parts(tmp_path: Path) -> None:
    whole = tmp_path / "rows.jsonl"
    for path in (whole, shard_path(whole, Shard(2, 11)), tmp_path / "rows.x-of-y.jsonl", tmp_path / "a.1-of-2.jsonl"):
        path.touch()
    assert [path.name for path in shard_paths(whole)] == ["rows.2-of-11.jsonl"]
    assert shard_path(whole, None) == whole


def test_shards_write_together_and_nobody_else(tmp_path: Path) -> None:
    first, second = (sole_writer(tmp_path, shard=Shard(number, 2)) for number in (1, 2))
    with first, second, pytest.raises(ConfigError, match="another process"), sole_writer(tmp_path):
        raise AssertionError("a run without a shard may write")
    with sole_writer(tmp_path), pytest.raises(ConfigError), sole_writer(tmp_path, shard=Shard(1, 2)):
        raise AssertionError("a shard may write beside a run without one")


def test_mixtures_by_shards_leave_the_same_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard runs twice and one never: the last command makes its trials."""
    options = ("--count", 8, "--segment-seconds", 0.5, "--sample-rate", 8000, "--workers", 1)
    assert command(capsys, "mix", corpus, tmp_path / "whole", *options).status == 0
    for shard in ("3/3", "1/3", "1/3"):
        done = command(capsys, "mix", corpus, tmp_path / "parts", *options, "--shard", shard)
        assert done.status == 0, done.err
        assert "run the same command without --shard" in done.out
    summary = json.loads((tmp_path / "parts" / "mixture.json").read_text())["summary"]
    assert summary is None
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.wav")}
    done = command(capsys, "mix", corpus, tmp_path / "parts", *options)
    assert done.status == 0, done.err
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.wav")}
    assert before
    assert before.items() < after.items()  # nothing was made twice


def pack(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    return command(capsys, "corpus", "pack", *arguments, "--sample-rate", 8000, "--speeds", 0.9, "--workers", 1)


def test_packing_by_shards_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a silent file; one shard runs twice, one was killed, and one is of another division of the work."""
    shutil.copytree(corpus, tmp_path / "corpus")
    files = sorted((tmp_path / "corpus").rglob("*.flac"))
    write_audio(files[2], np.zeros(8000, dtype=np.float32), 8000)
    broken = ("--max-broken", 0.5)
    assert pack(capsys, tmp_path / "corpus", tmp_path / "whole", *broken).status == 0
    for shard in ("3/3", "1/3", "1/3", "2/2"):
        done = pack(capsys, tmp_path / "corpus", tmp_path / "parts", *broken, "--shard", shard)
        assert done.status == 0, done.err
        assert "packed; when all shards are done, run the same command without --shard" in done.out
    (tmp_path / "parts.2-of-3.part").mkdir()
    (tmp_path / "parts.2-of-3.part" / "samples.int16").write_bytes(b"half")
    assert not (tmp_path / "parts").exists()
    done = pack(capsys, tmp_path / "corpus", tmp_path / "parts", *broken)
    assert (done.status, done.err) == (0, "")
    rows = (tmp_path / "parts" / "utterances.jsonl").read_text().splitlines()
    assert sum('"fault"' in row for row in rows) == 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "whole", "parts"}


def test_parts_of_a_pack_that_do_not_fit(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(capsys, corpus, tmp_path / "parts", "--shard", "1/2").status == 0
    part = tmp_path / "parts.1-of-2"
    done = pack(capsys, corpus, tmp_path / "parts", "--keep-mean")
    assert f"{part}: belongs to a pack of something else; remove it, and pack this shard again" in done.err
    for name in ("samples.int16", "utterances.jsonl", "pack.json"):
        content = (part / name).read_bytes()
        (part / name).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        done = pack(capsys, corpus, tmp_path / "parts")
        assert (done.status, done.err.count(f"{part}: is damaged; remove it, and pack this shard again")) == (2, 1)
        (part / name).write_bytes(content)
    assert not (tmp_path / "parts").exists()
    with sole_writer(tmp_path / "parts.2-of-2.part"):
        done = pack(capsys, corpus, tmp_path / "parts")
    assert "another process" in done.err
    assert pack(capsys, corpus, tmp_path / "parts").status == 0
    for name in ("parts.1-of-9", "others.1-of-9.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
        done = pack(capsys, corpus, tmp_path / name.partition(".")[0])
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert (tmp_path / name / "thesis.txt").exists()


def test_an_evaluation_by_shards_has_the_same_rows(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_tiny(tmp_path / "tiny.safetensors")
    asked = ("-r", weights, "-t", trials, "--metrics", "si_sdr", "si_sdr_improvement", "-b", 5, "-j", 1)
    asked = (*asked, "--device", "cpu")
    assert command(capsys, "eval", *asked, "-o", tmp_path / "whole.json").status == 0
    for shard in ("1/4", "3/4", "4/4"):
        done = command(capsys, "eval", *asked, "-o", tmp_path / "parts.json", "--shard", shard)
        assert done.status == 0, done.err
    assert not (tmp_path / "parts.json").exists()
    kept = [path.name for path in shard_paths(tmp_path / "parts.journal.jsonl")]
    assert kept == [f"parts.journal.{number}-of-4.jsonl" for number in (1, 3, 4)]
    done = command(capsys, "eval", *asked, "--limit", 20, "-o", tmp_path / "parts.json")
    assert "belongs to an unfinished evaluation of something else (data differ)" in done.err
    assert command(capsys, "eval", *asked, "-o", tmp_path / "parts.json").status == 0
    whole, parts = (
        [replace(row, network_seconds=None) for row in read_result(tmp_path / f"{name}.json").rows]
        for name in ("whole", "parts")
    )
    assert parts == whole
    assert not list(tmp_path.glob("*.jsonl"))
    done = command(capsys, "eval", *asked, "--shard", "1/4")
    assert "--shard: needs --output" in done.err


@pytest.fixture
def jobs(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Five jobs in jobs.jsonl, and weights; the current folder."""
    names = sorted(path.name.removesuffix("-mixed.wav") for path in trials.glob("*-mixed.wav"))[:5]
    rows = [
        {"mixture": f"{trials}/{name}-mixed.wav", "voice": f"{trials}/{name}-ref.wav", "output": f"out/{name}.wav"}
        for name in names
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return rows


EXTRACT = ("extract", "--jobs-file", "jobs.jsonl", "--pretrained", "tiny.safetensors", "--precision", "float32")


def test_a_job_list_by_shards(jobs: list[dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    for shard in ("1/2", "2/2"):
        done = command(capsys, *EXTRACT, "--results", "r.jsonl", "--shard", shard)
        assert done.status == 0, done.err
    times = {row["output"]: Path(row["output"]).stat().st_mtime_ns for row in jobs}
    done = command(capsys, *EXTRACT, "--results", "r.jsonl")
    assert (done.status, done.out) == (0, "r.jsonl: 5 jobs are done, 0 are left\n")
    assert {row["output"]: Path(row["output"]).stat().st_mtime_ns for row in jobs} == times
    header, *rows = map(json.loads, Path("r.jsonl").read_text().splitlines())
    assert header["jobs"] == 5
    assert [row["output"] for row in rows] == [row["output"] for row in jobs]
    assert all(row["error"] is None and row["seconds"] == 1.0 for row in rows)
    assert not shard_paths(Path("r.jsonl"))


def test_a_stopped_job_list_resumes(
    jobs: list[dict[str, str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after an output and before its row: the output is made again. What failed is tried again."""
    Path("jobs.jsonl").write_text(Path("jobs.jsonl").read_text().replace(jobs[3]["mixture"], "late.wav"))
    Path("late.wav").write_bytes(Path(jobs[3]["mixture"]).read_bytes())
    with monkeypatch.context() as patch:
        calls: list[object] = []

        def interrupt(job: object, result: object) -> dict[str, object]:
            calls.append(job)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return {"output": jobs[0]["output"], "error": None}

        patch.setattr("onevoice.extraction.job_results.row_of", interrupt)
        assert command(capsys, *EXTRACT, "--results", "r.jsonl").status == 130
    Path("late.wav").unlink()
    assert Path(jobs[1]["output"]).is_file()
    done = command(capsys, *EXTRACT, "--results", "r.jsonl")
    assert (done.status, done.err.count("late.wav: no such file")) == (2, 1)
    Path("late.wav").write_bytes(Path(jobs[3]["mixture"]).read_bytes())
    Path(jobs[4]["output"]).unlink(missing_ok=True)
    done = command(capsys, *EXTRACT, "--results", "r.jsonl")
    assert done.status == 0, done.err
    assert done.out.startswith("r.jsonl: 1 jobs are done, 4 are left\n")
    assert len(list(Path("out").iterdir())) == 5
    Path("jobs.jsonl").write_text(json.dumps(jobs[0]))
    done = command(capsys, *EXTRACT, "--results", "r.jsonl")
    assert "holds something other than the results of this job list; name another file" in done.err


def test_options_that_need_a_job_list(jobs: list[dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    names = (jobs[0]["mixture"], jobs[0]["voice"], "a.wav")
    for option in (("--shard", "1/2"), ("--results", "r.jsonl")):
        done = command(capsys, "extract", *names, *option)
        assert (done.status, done.err.count("are for a job list (--list)")) == (2, 1)
