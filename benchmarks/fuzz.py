"""Damaged files through the commands that read them: what the commands make of each, counted by kind.

    python benchmarks/fuzz.py [--cases 10000] [--minutes 10] [--seed 0] [--only PART] [--first 0]
    python benchmarks/fuzz.py --case NAME:NUMBER

Every case is a good file with a few random changes (`mutate.py`), read by a command that works on the good file. The
seed and the number of a case give its bytes, so `--case` repeats it and shows the traceback. Cases run in forked
processes of 50 each, in which the command runs as a function; a process that crashes or hangs is replaced.

refused    status 1 or 2 and one line that begins with "onevoice: error:"
accepted   status 0
traceback  the command ended in another exception, or without that line
crash      the process was killed by a signal
hang       longer than 10 s
partial    a file with a temporary name, an unreadable sound, or any file after an error was left
memory     the process grew by more than 2 GB
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from mutate import Mutator, mutate_bytes, mutate_header, mutate_json, mutate_pickle, mutate_tensors, mutate_text  # noqa: E402
from original import original_checkpoint, original_config, random_network  # noqa: E402
from plain_librimix import make_toy  # noqa: E402
from tiny import save_tiny  # noqa: E402
from toy_runs import write_experiment  # noqa: E402
from voices import make_corpus, make_trials  # noqa: E402

from onevoice.audio import write_audio  # noqa: E402
from onevoice.cli import main  # noqa: E402
from onevoice.extraction.checkpoint import load_checkpoint  # noqa: E402
from onevoice.rng import derive  # noqa: E402

BATCH = 50
MAX_SECONDS = 10.0
MAX_BYTES = 2 * 10**9
KINDS = ("refused", "accepted", "traceback", "crash", "hang", "partial", "memory")
SOUNDS = ("wav", "flac", "ogg", "mp3", "float.wav", "24.wav", "mulaw.wav", "opus", "aiff")


@dataclass(frozen=True)
class Target:
    """A file to damage and the command that reads it."""

    name: str
    file: str
    """The file, in the folder of good files."""
    mutate: Mutator
    command: str
    """Its words; {file} is the damaged file, {out} an empty folder, {home} the good files and {case} a copy of them."""
    weight: float = 1.0
    """How often it is drawn."""
    leaves: bool = False
    """Whether files may stay after an error, because the command resumes."""


class Result(NamedTuple):
    kind: str
    detail: str = ""


def make_home(home: Path) -> Path:
    """Write small good files of every kind that a command reads."""
    trials = make_trials(home / "trials", 3, seed=1)
    save_tiny(home / "tiny.safetensors")
    checkpoint = str(home / "tiny.safetensors")
    mixture, voice = sorted(trials.glob("*-mixed.wav"))[0], sorted(trials.glob("*-ref.wav"))[0]
    shutil.copy(voice, home / "ref.wav")
    samples, rate = soundfile.read(mixture, dtype="float32")
    for ending in SOUNDS:
        subtype = {"float.wav": "FLOAT", "24.wav": "PCM_24", "mulaw.wav": "ULAW"}.get(ending)
        if ending == "opus" or ending == "aiff":
            soundfile.write(home / f"m.{ending}", samples, rate, format={"opus": "OGG", "aiff": "AIFF"}[ending],
                            subtype={"opus": "OPUS", "aiff": "PCM_16"}[ending])  # fmt: skip
        else:
            write_audio(home / f"m.{ending}", samples, rate, subtype=subtype)
    make_corpus(home / "corpus", 2, 2, 1.5)
    flac = sorted((home / "corpus").rglob("*.flac"))[0]
    shutil.move(flac, home / "corpus" / "spk000" / "victim.flac")
    rows = [
        (path.relative_to(home).as_posix(), path.parts[-3]) for path in sorted((home / "corpus").glob("*/*/*.flac"))
    ]
    (home / "corpus.csv").write_text("path,speaker,gender\n" + "".join(f"{path},{name},F\n" for path, name in rows))
    (home / "corpus.jsonl").write_text(
        "".join(json.dumps({"path": path, "speaker": name, "gender": "M"}) + "\n" for path, name in rows)
    )
    (home / "genders.csv").write_text("speaker,gender\nspk000,F\nspk001,M\nspk002,F\nspk003,M\n")
    jobs = [{"mixture": "m.wav", "voice": "ref.wav", "output": f"out/{k}.wav", "residual": None} for k in range(2)]
    (home / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    toy = make_toy(home / "libri")
    protocol = {
        "kind": "librimix_metadata", "metadata": str(toy.metadata[2]), "librispeech_dir": str(toy.librispeech),
        "wham_dir": str(toy.wham), "limit": 2,
    }  # fmt: skip
    (home / "protocol.json").write_text(json.dumps({"data": protocol}))
    evaluation = {
        "folder": str(trials), "batch_size": 2, "jobs": 1, "limit": 2, "metrics": ["si_sdr"],
        "genders": str(home / "genders.csv"), "device": "cpu",
    }  # fmt: skip
    (home / "eval.json").write_text(json.dumps(evaluation))
    write_experiment(home / "train.json", trials, name="run", training__epochs=1, data__validation__limit=1)
    (home / "original-train.json").write_text(json.dumps(original_config()))
    theirs = original_config()
    theirs["data"] = {"test": {**theirs["data"]["val"], "batch_size": 3}}
    (home / "original-eval.json").write_text(json.dumps(theirs))
    torch.save(original_checkpoint(random_network()), home / "original.pth")
    for words in (
        f"enroll {home}/ref.wav -o {home}/v.voice --pretrained {checkpoint}",
        f"corpus pack {home}/corpus {home}/pack --sample-rate 8000 --workers 1 --max-broken 0.5",
        f"mix {home}/corpus {home}/mixed --count 3 --workers 1 --segment-seconds 0.5 --sample-rate 8000",
        f"eval -r {checkpoint} -t {trials} -j 1 --metrics si_sdr -o {home}/result.json",
        f"train -c {home}/train.json",
    ):
        with quiet():
            main(words.split())
    state = load_checkpoint(home / "tiny.safetensors")[0]
    torch.save({"state_dict": state}, home / "w.pth")
    values = json.loads((home / "train.json").read_text())
    values["data"]["train"] = {"kind": "dynamic", "pack": str(home / "pack"), "examples_per_epoch": 4}
    values["name"] = "packed"
    (home / "packed.json").write_text(json.dumps(values))
    (home / "model.json").write_text(json.dumps({**evaluation, "model": {**values["model"], "num_classes": 4}}))
    return home


def targets() -> list[Target]:
    """Return all pairs of a file and a command."""
    weights = "{home}/tiny.safetensors"
    use, files = f"--pretrained {weights} --device cpu", "--workers 1 --sample-rate 8000"
    evaluate = f"eval -r {weights} -j 1 --metrics si_sdr --limit 1 -o {{out}}/r.json"
    mix = f"mix {{home}}/corpus {{case}}/mixed --count 3 --segment-seconds 0.5 {files}"
    mix_damaged = f"mix {{case}}/corpus {{out}}/mixed --count 2 --segment-seconds 0.5 {files}"
    export = "mix --workers 1 {out}/m --protocol"
    train = "train --minutes 0 --set runs_folder={out}/runs"
    packed = f"{train} data.train.pack={{case}}/pack -c {{case}}/packed.json"
    page = "report {case}/runs/run -o {out}/r.html"
    victim = "corpus/spk000/victim.flac"
    sounds = (
        ("mixture", f"extract {{file}} {{home}}/ref.wav {{out}}/o.wav --residual {{out}}/r.flac {use}", 2.0),
        ("enrollment", f"extract {{home}}/m.wav {{file}} {{out}}/o.wav {use}", 1.0),
        ("enroll", f"enroll {{file}} {{home}}/ref.wav -o {{out}}/o.voice {use}", 0.5),
    )
    return [
        *(
            Target(f"{kind}/{ending}", f"m.{ending}", mutate_bytes, command, weight)
            for ending in SOUNDS
            for kind, command, weight in sounds
        ),
        Target("scan", victim, mutate_bytes, "corpus scan {case}/corpus --decode --workers 1"),
        Target("pack", victim, mutate_bytes, f"corpus pack {{case}}/corpus {{out}}/p {files}"),
        Target("mix", victim, mutate_bytes, mix_damaged, 0.5, True),
        Target("csv", "corpus.csv", mutate_text, "corpus scan {file} --workers 1", 4),
        Target("jsonl", "corpus.jsonl", mutate_json, "corpus scan {file} --workers 1", 4),
        Target("speakers", "genders.csv", mutate_text, "corpus scan {home}/corpus.csv --workers 1 --speakers {file}"),
        Target("jobs", "jobs.jsonl", mutate_json, f"extract --list {{file}} {use}", 4, True),
        Target("metadata", "libri/metadata/libri2mix.csv", mutate_text, f"{export} {{case}}/protocol.json", 2, True),
        Target("protocol", "protocol.json", mutate_json, f"{export} {{file}}", 2, True),
        Target("eval config", "eval.json", mutate_json, f"{evaluate} -c {{file}}", 3, True),
        Target("genders", "genders.csv", mutate_text, f"{evaluate} -t {{home}}/trials --genders {{file}}", 1, True),
        Target("trial manifest", "mixed/manifest.jsonl", mutate_json, f"{evaluate} -t {{case}}/mixed", 2, True),
        Target("mixture.json", "mixed/mixture.json", mutate_json, mix, 0.5, True),
        Target("mix manifest", "mixed/manifest.jsonl", mutate_json, mix, 1, True),
        Target("train config", "train.json", mutate_experiment, f"{train} -c {{file}}", 4, True),
        Target("original train", "original-train.json", mutate_json, "convert {file} {out}/o.json", 2),
        Target("original eval", "original-eval.json", mutate_json, "convert {file} {out}/o.json", 2),
        Target("voice", "v.voice", mutate_tensors, f"extract {{home}}/m.wav {{file}} {{out}}/o.wav {use}", 4),
        Target("card", "tiny.safetensors", mutate_tensors, "info {file}", 4),
        Target(
            "weights", "tiny.safetensors", mutate_tensors,
            "extract {home}/m.wav {home}/ref.wav {out}/o.wav --device cpu --pretrained {file}", 3,
        ),
        Target("pth", "w.pth", mutate_pickle, "convert {file} {out}/o.safetensors --config {home}/model.json", 4),
        Target("original pth", "original.pth", mutate_bytes, "convert {file} {out}/o.safetensors"),
        Target(
            "resume", "runs/run/last.resume.pt", mutate_pickle,
            "train --minutes 0 -r {case}/runs/run/last.safetensors", 3, True,
        ),
        Target("run config", "runs/run/config.json", mutate_json, page),
        Target("run metrics", "runs/run/metrics.jsonl", mutate_json, page),
        Target("result", "result.json", mutate_json, "report {case}/result.json -o {out}/r.html --played 0", 2),
        Target("rows", "result.csv", mutate_text, "compare {case}/result.csv {home}/result.csv", 3),
        Target("compared", "result.json", mutate_json, "compare {home}/result.json {case}/result.json", 3),
        *(
            Target(f"{verb} {name}", f"pack/{name}", change, command, weight, verb == "train on")
            for name, change in PACK.items()
            for verb, command, weight in (("verify", "corpus verify {case}/pack", 2.0), ("train on", packed, 0.7))
        ),
    ]  # fmt: skip


def mutate_experiment(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a config for training, but not to the network of the default size, which takes longer than a case may."""
    changed = mutate_json(rng, data)
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(changed)
        if isinstance(values, dict) and "name" in values:
            return json.dumps({"model": json.loads(data)["model"], **values}).encode()
    return changed


PACK: dict[str, Mutator] = {
    "pack.json": mutate_header, "index.npy": mutate_bytes, "utterances.jsonl": mutate_json,
    "samples.int16": mutate_bytes,
}  # fmt: skip
"""The files of a pack, and how each is damaged."""


@contextlib.contextmanager
def quiet() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Keep what a command prints."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True) for errors in ("strict", "backslashreplace")
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def draw_target(seed: int, number: int, among: Sequence[Target]) -> Target:
    weights = [target.weight for target in among]
    return among[int(derive(seed, "target", number).choice(len(among), p=[w / sum(weights) for w in weights]))]


def run_case(home: Path, place: Path, target: Target, seed: int, number: int, show: bool = False) -> Result:
    """Damage the file, run the command, and say what became of it."""
    case, out = place / "case", place / "out"
    path = lay_out(home, case, out, target)
    path.write_bytes(target.mutate(derive(seed, target.name, number), path.read_bytes()))
    words = [word.format(file=path, out=out, home=home, case=case) for word in target.command.split()]
    if show:
        print(" ".join(words))
        main(words)
    status, problem = 0, ""
    with quiet() as (_, err):
        try:
            main(words)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException as error:  # what we look for
            problem = describe(error)
    err.seek(0)
    last = (err.read().splitlines() or [""])[-1]
    if problem or (status and not last.startswith("onevoice: error: ")):
        return Result("traceback", problem or f"status {status}: {last[:200]}")
    left = find_partial(case, out, status != 0 and not target.leaves)
    return Result("partial", left) if left else Result("refused" if status else "accepted", last)


def lay_out(home: Path, case: Path, out: Path, target: Target) -> Path:
    """Copy the file to damage and the files that must lie beside it, and return it."""
    for folder in (case, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    top = Path(target.file).parts[0]
    (shutil.copytree if (home / top).is_dir() else shutil.copy)(home / top, case / top)
    beside = {
        "result.json": ["result.csv"], "result.csv": ["result.json"], "pack": ["packed.json"],
        "jobs.jsonl": ["m.wav", "ref.wav"],
    }  # fmt: skip
    for name in beside.get(top, []):
        shutil.copy(home / name, case / name)
    if top.startswith("corpus."):
        (case / "corpus").symlink_to(home / "corpus")
    if top == "libri":
        text = (home / "protocol.json").read_text().replace(f"{home}/libri/metadata", f"{case}/libri/metadata")
        (case / "protocol.json").write_text(text)
    return case / target.file


def describe(error: BaseException) -> str:
    """Return the type of an error, the last line of the package in its traceback, and what it says."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "/onevoice/" in each.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:150]}"


def find_partial(case: Path, out: Path, must_be_empty: bool) -> str:
    """Return what a command should not have left."""
    files = [path for path in out.rglob("*") if path.is_file()]
    parts = [path.name for path in [*files, *case.rglob("*")] if path.name.endswith(".part")]
    if parts:
        return f"left {parts[0]}"
    if must_be_empty and files:
        return f"left {files[0].relative_to(out)} after an error"
    for path in files:
        if path.suffix in (".wav", ".flac"):
            try:
                soundfile.read(path)
            except soundfile.LibsndfileError as error:
                return f"unreadable {path.name}: {error}"
    return ""


def work(connection: Connection, home: Path, place: Path, seed: int, cases: list[tuple[int, Target]]) -> None:
    """Run cases in this process and send each result."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    place.mkdir(exist_ok=True)
    os.chdir(place)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MAX_BYTES, size + 2 * MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, target in cases:
        connection.send(("begin", number))
        result = run_case(home, place, target, seed, number)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MAX_BYTES:
            result = Result("memory", f"{grown / 1e9:.1f} GB; {result.kind}: {result.detail}")
        connection.send(("end", result))
        if result.kind == "memory":
            return
    connection.send(("done", None))


def run_batch(
    home: Path, place: Path, seed: int, cases: list[tuple[int, Target]]
) -> Iterator[tuple[int, Target, Result]]:
    """Yield the result of every case; processes that crash or hang are replaced."""
    todo = list(cases)
    while todo:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=work, args=(theirs, home, place, seed, todo))
        process.start()
        theirs.close()
        while todo:
            result: Result | None = None
            try:
                if not ours.poll(MAX_SECONDS):
                    result = Result("hang", f"longer than {MAX_SECONDS:g} s")
                else:
                    word, value = ours.recv()
                    if word == "end":
                        result = value
            except EOFError:
                process.join()
                result = Result("crash", f"exit code {process.exitcode}")
            if result is not None:
                yield *todo.pop(0), result
                if result.kind in ("hang", "crash", "memory"):
                    break
        process.kill()
        process.join()
        ours.close()


def fuzz(cases: int, minutes: float, seed: int, only: str, first: int, show: bool = True) -> Counter[str]:
    """Run cases until their number or the time is reached; print the counts and one line per different problem."""
    among = [target for target in targets() if only in target.name]
    counts: Counter[str] = Counter()
    by_target: Counter[str] = Counter()
    problems: dict[tuple[str, str], list[str]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        home = make_home(Path(folder) / "home")
        among = [target for target in among if (home / target.file).exists()]
        begin = time.monotonic()
        for start in range(first, first + cases, BATCH):
            batch = [(k, draw_target(seed, k, among)) for k in range(start, min(start + BATCH, first + cases))]
            for number, target, result in run_batch(home, Path(folder) / "place", seed, batch):
                counts[result.kind] += 1
                by_target[target.name] += 1
                if result.kind not in ("refused", "accepted"):
                    key = (result.kind, result.detail.split(": ")[0])
                    problems.setdefault(key, []).append(f"{target.name}:{number}  {result.detail}")
            if time.monotonic() - begin > 60 * minutes:
                break
    if show:
        total = sum(counts.values())
        print(f"{total} cases of {len(by_target)} kinds with seed {seed} in {(time.monotonic() - begin) / 60:.1f} min")
        print("\n".join(f"{kind:10} {counts[kind]}" for kind in KINDS))
        for (kind, _), found in sorted(problems.items()):
            print(f"{kind} x {len(found)}: {'; '.join(found[:5])}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count what commands make of damaged files.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", default="", help="a part of the names of the targets to use")
    parser.add_argument("--case", help="NAME:NUMBER, to repeat one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        name, number = options.case.rsplit(":", 1)
        with tempfile.TemporaryDirectory() as folder:
            home = make_home(Path(folder) / "home")
            (chosen,) = [target for target in targets() if target.name == name]
            run_case(home, Path(folder) / "place", chosen, options.seed, int(number), show=True)
    else:
        found = fuzz(options.cases, options.minutes, options.seed, options.only, options.first)
        sys.exit(bool(sum(found.values()) - found["refused"] - found["accepted"]))
