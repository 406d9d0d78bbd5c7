"""Bad input gives one line on standard error that names the file or key, status 2, and no half-written file."""

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from tiny import ROOT, TINY, Outcome, command, full_disk, process, save_tiny
from toy_runs import PATIENCE, forked_process, write_experiment
from voices import Voice, make_corpus, make_trials

from onevoice.audio import write_audio
from onevoice.extraction.checkpoint import Card, load_model, save_checkpoint
from onevoice.models import SpExPlus


class Home(NamedTuple):
    """A folder with everything that a command needs, all of it valid."""

    folder: Path

    @property
    def trials(self) -> Path:
        return self.folder / "trials"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "good.safetensors"

    @property
    def mixture(self) -> Path:
        return sorted(self.trials.glob("*-mixed.wav"))[0]

    @property
    def enrollment(self) -> Path:
        return sorted(self.trials.glob("*-ref.wav"))[0]

    @property
    def config(self) -> Path:
        return self.folder / "toy.json"

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def arguments(self, verb: str) -> list[object]:
        """The arguments of a command that works."""
        return {
            "extract": [
                "extract", self.mixture, self.enrollment, self.folder / "out.wav", "--checkpoint", self.checkpoint,
            ],
            "eval": [
                "eval", "-r", self.checkpoint, "-t", self.trials, "-j", "1", "-o", self.folder / "result.json",
                "--metrics", "si_sdr",
            ],
            "train": ["train", "-c", self.config],
        }[verb]  # fmt: skip


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pattern")
    make_trials(folder / "trials", 6, seed=1)
    save_tiny(folder / "good.safetensors")
    return folder


@pytest.fixture
def home(pattern: Path, tmp_path: Path) -> Home:
    home = Home(Path(shutil.copytree(pattern, tmp_path / "home")))
    write_experiment(home.config, home.trials)
    return home


def check_error(outcome: Outcome, *words: object) -> None:
    """Check for status 2 and one line with the words in it."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("onevoice: error: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err


def check_fails(capsys: pytest.CaptureFixture[str], home: Home, arguments: list[object], *words: object) -> None:
    """Check that the command fails and leaves the folder unchanged, except for the record of a started training."""
    before = home.files()
    check_error(command(capsys, *arguments), *words)
    after = {path: data for path, data in home.files().items() if "runs" not in path.parts}
    assert after == before
    assert not list(home.folder.rglob("*.part"))
    assert not list(home.folder.rglob("runs/**/*.safetensors"))


def test_the_commands_work_on_good_input(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("extract", "eval", "train"):
        assert command(capsys, *home.arguments(verb)).status == 0
    assert {"out.wav", "result.json", "result.csv", "runs"} <= {path.name for path in home.folder.iterdir()}


# Sound ----------------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("This is not sound.\n" * 50)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def encoded_and_cut(ending: str, kept: float = 0.6) -> Callable[[Path], None]:
    """Cut an encoded file under a .wav name: the bytes decide the format, not the name."""

    def spoil(path: Path) -> None:
        samples, rate = soundfile.read(path, dtype="float32")
        write_audio(path.with_suffix(ending), np.tile(samples, 4), rate)  # several Ogg pages
        data = path.with_suffix(ending).read_bytes()
        path.with_suffix(ending).unlink()
        path.write_bytes(data[: int(kept * len(data))])

    return spoil


def as_float(samples: np.ndarray) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        soundfile.write(path, samples, 8000, subtype="FLOAT")

    return spoil


def one_nan(path: Path) -> None:
    samples = soundfile.read(path, dtype="float32")[0]
    samples[len(samples) // 2] = np.nan
    as_float(samples)(path)


def silence(path: Path) -> None:
    as_float(np.zeros(len(soundfile.read(path)[0]), np.float32))(path)


def headers_alone(path: Path) -> None:
    as_float(np.zeros(0, np.float32))(path)


def impossible_rate(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 1)
    path.write_bytes(data)


SOUND: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (empty, "the file is empty"),
    "text": (text, "cannot be decoded"),
    "cut WAV": (cut, "truncated"),
    "cut FLAC": (encoded_and_cut(".flac"), "cannot be decoded"),
    "cut Opus": (encoded_and_cut(".opus"), "truncated"),
    "cut MP3": (encoded_and_cut(".mp3"), "truncated"),
    "NaN": (one_nan, "holds NaN or infinite samples"),
    "silence": (silence, "is silent"),
    "no samples": (headers_alone, "holds no samples"),
    "1 Hz": (impossible_rate, "sample rate of 1 Hz"),
}


@pytest.mark.parametrize(("spoil", "complaint"), SOUND.values(), ids=list(SOUND))
@pytest.mark.parametrize("which", ["mixture", "enrollment"])
@pytest.mark.parametrize("verb", ["extract", "eval", "train"])
def test_unusable_sound(
    home: Home, capsys: pytest.CaptureFixture[str], verb: str, which: str, spoil: Callable[[Path], None], complaint: str
) -> None:
    path: Path = getattr(home, which)
    spoil(path)
    if (verb, which, spoil) == ("extract", "mixture", silence):  # that is no mistake
        assert "the recording is silent, so the output is too" in command(capsys, *home.arguments(verb)).out
        return
    check_fails(capsys, home, home.arguments(verb), path, complaint)


@pytest.mark.parametrize("which", ["mixture", "enrollment"])
def test_missing_sound_for_extract(home: Home, capsys: pytest.CaptureFixture[str], which: str) -> None:
    path: Path = getattr(home, which)
    arguments = home.arguments("extract")
    path.unlink()
    check_fails(capsys, home, arguments, path, "no such file")


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_missing_file_of_a_trial(home: Home, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    home.enrollment.unlink()
    message = "the enrollment is missing for 1 of 6 trials, first 'spk"
    check_fails(capsys, home, home.arguments(verb), home.trials, message)


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_a_target_of_another_length(home: Home, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    path = sorted(home.trials.glob("*-target.wav"))[0]
    write_audio(path, np.ones(5000, np.float32) / 2, 8000)
    check_fails(capsys, home, home.arguments(verb), path, "has 5000 samples, its mixture 8000; they must match")


def test_an_enrollment_that_is_too_short(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(home.enrollment, Voice.number(0).say(0, 0.2), 8000)
    check_fails(
        capsys, home, home.arguments("extract"), home.enrollment, "lasts 0.20 s; an enrollment needs at least 0.5 s"
    )


def test_folders_and_names_in_place_of_files(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for name, complaint in ((home.trials, "is a folder"), ("n" * 300 + ".wav", "too long"), ("a\nb.wav", r"a\nb.wav")):
        arguments = home.arguments("extract")
        arguments[1] = name
        check_fails(capsys, home, arguments, complaint)


def test_unusable_sound_in_a_worker(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    cut(home.mixture)
    check_fails(capsys, home, [*home.arguments("train"), "--set", "data.workers=1"], home.mixture, "truncated")


def test_a_command_ends_after_an_error_in_a_worker(home: Home) -> None:
    """A worker ignores signals to stop; it must not keep the command from exiting."""
    cut(home.mixture)
    arguments = [*home.arguments("train"), "--set", "data.workers=1"]
    done = subprocess.run(
        [sys.executable, "-m", "onevoice", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert "truncated" in done.stderr.splitlines()[-1]


def test_bad_sound_in_a_separate_process(home: Home) -> None:
    """A real process prints the same single line on standard error."""
    cut(home.mixture)
    before = home.files()
    check_error(process(["-m", "onevoice", *home.arguments("extract")]), home.mixture, "truncated")
    check_error(forked_process([ROOT / "eval.py", *home.arguments("eval")[1:]]), "truncated")
    assert home.files() == before


# Corpora and folders of trials ----------------------------------------------------------------------------------


def one_speaker(folder: Path) -> None:
    make_corpus(folder, speakers=1, seconds=1.0)


def one_file(folder: Path) -> None:
    make_corpus(folder, speakers=1, utterances=1, seconds=1.0)


def one_file_each(folder: Path) -> None:
    make_corpus(folder, utterances=1, seconds=1.0)


def silent_corpus(folder: Path) -> None:
    for path in sorted(make_corpus(folder, speakers=2, utterances=2, seconds=1.0).rglob("*.flac")):
        write_audio(path, np.zeros(8000, np.float32), 8000)


def text_corpus(folder: Path) -> None:
    for path in sorted(make_corpus(folder, speakers=2, utterances=2, seconds=1.0).rglob("*.flac")):
        text(path)


def no_folders(folder: Path) -> None:
    folder.mkdir()


CORPORA: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: None, "no such file or folder"),
    "a file": (lambda folder: folder.write_text("x"), "is not a corpus; name a folder"),
    "empty": (no_folders, "put one folder per speaker there"),
    "one speaker": (one_speaker, "a mixture needs at least 2"),
    "one file": (one_file, "a mixture needs at least 2"),
    "one file each": (one_file_each, "no speaker has 2 files"),
    "silence": (silent_corpus, "no mixture could be made"),
    "text": (text_corpus, "no mixture could be made"),
}


@pytest.mark.parametrize(("make", "complaint"), CORPORA.values(), ids=list(CORPORA))
def test_a_corpus_that_cannot_be_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], complaint: str
) -> None:
    make(tmp_path / "corpus")
    out = tmp_path / "out"
    done = command(capsys, "mix", tmp_path / "corpus", out, "--count", "2", "--workers", "1", "--sample-rate", "8000")
    lines = done.err.strip().splitlines()
    check_error(done._replace(err=f"{lines[-1]}\n"), complaint)  # a progress bar may come first
    assert not list(tmp_path.rglob("*.wav"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--count", "0"], "0 trials are too few"),
        (["--sample-rate", "0"], "0 Hz"),
        (["--snr", "nan"], "nan"),
        (["--segment-seconds", "0"], "0.1 s or more"),
        (["--workers", "-1"], "must be 1 or more"),
        (["--vad-db", "-3"], "vad_db: -3"),
    ],
)
def test_mix_out_of_range(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    check_error(command(capsys, "mix", corpus, tmp_path / "out", *options), complaint)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_folders_without_trials(home: Home, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    shutil.rmtree(home.trials)
    check_fails(
        capsys, home, ["eval", "-r", home.checkpoint, "-t", home.trials], home.trials, "no such folder of trials"
    )
    home.trials.mkdir()
    arguments = ["eval", "-r", home.checkpoint, "-t", home.trials] if verb == "eval" else ["train", "-c", home.config]
    check_fails(capsys, home, arguments, home.trials, "holds no trials")


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_a_damaged_manifest(home: Home, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (home.trials / "manifest.jsonl").write_text('{"name": "a", "targ')
    check_fails(capsys, home, home.arguments(verb), home.trials / "manifest.jsonl", "line 1 is not a row")


# Configs --------------------------------------------------------------------------------------------------------


CONFIGS = {
    "typo": ('{"batch_sise": 1}', "batch_sise: unknown key; did you mean 'batch_size'?"),
    "wrong type": ('{"batch_size": "1"}', 'batch_size: input should be a valid integer, not "1"'),
    "out of range": ('{"batch_size": 0}', "batch_size: input should be greater than 0, not 0"),
    "unknown metric": ('{"metrics": ["wer"]}', "metrics.0: input should be"),
    "broken": ('{"batch_size": 1,}', "not valid JSON"),
    "cut": ('{"batch_size"', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "twice": ('{"limit": 1, "limit": 2}', "the key 'limit' appears twice"),
    "a list": ("[]", "must hold a JSON object"),
    "deep": ('{"model": {"name": "spexplus", "hiden": 3}}', "model.hiden: unknown key; did you mean 'hidden'?"),
}


@pytest.mark.parametrize(("content", "complaint"), CONFIGS.values(), ids=list(CONFIGS))
def test_configs_of_eval(home: Home, capsys: pytest.CaptureFixture[str], content: str, complaint: str) -> None:
    path = home.folder / "test.json"
    path.write_text(content)
    check_fails(capsys, home, ["eval", "-c", path, *home.arguments("eval")[1:]], path, complaint)


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_no_config(home: Home, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    path = home.folder / "none.json"
    arguments = ["train", "-c", path] if verb == "train" else [*home.arguments("eval"), "-c", path]
    check_fails(capsys, home, arguments, path, "No such file or directory")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("trainin.epochs=2", "toy.json: trainin: unknown key; did you mean 'training'?"),
        ("training.epoch=2", "toy.json: training.epoch: unknown key; did you mean 'epochs'?"),
        ("training.epochs=two", 'toy.json: training.epochs: input should be a valid integer, not "two"'),
        ("optimizer.learning_rate=NaN", "toy.json: optimizer.learning_rate: input should be a finite number"),
        ("data.batch_size=0", "toy.json: data.batch_size: input should be greater than 0, not 0"),
        ('scheduler={"name": "onecycle", "max_lr": 1}', "scheduler.max_lr: unknown key; did you mean"),
        ("model.kernel_size=4", "toy.json: model: kernel_size must be odd, not 4"),
        ("model.num_classes=1", "model.num_classes: 1 is too small for the"),
        ("data.validation.folder=nowhere", "nowhere: no such folder of trials"),
        ("training.epochs", "write it as key=value"),
    ],
)
def test_configs_of_train(home: Home, capsys: pytest.CaptureFixture[str], setting: str, complaint: str) -> None:
    check_fails(capsys, home, [*home.arguments("train"), "--set", setting], complaint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_devices(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("extract", "eval"):
        for device in ("cuda", "gpu"):
            check_fails(
                capsys, home, [*home.arguments(verb), "--device", device], f"device: torch finds no device '{device}'"
            )
    check_fails(
        capsys,
        home,
        [*home.arguments("train"), "--set", "training.device=cuda"],
        "training.device: torch finds no device 'cuda'",
    )


# Checkpoints ----------------------------------------------------------------------------------------------------


class Malicious:
    """An object that creates a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.trace}",)


def other_program(path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(3)}, path)


def weights_of_other_sizes(path: Path) -> None:
    """Write the card of one model with the weights of another."""
    save_checkpoint(path, SpExPlus(replace(TINY, hidden=12)).state_dict(), Card(TINY))


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (missing, "no such checkpoint file"),
    "empty": (empty, "not a readable checkpoint"),
    "text": (text, "not a readable checkpoint"),
    "cut": (cut, "not a readable checkpoint"),
    "other program": (other_program, "another program wrote it"),
    "other sizes": (weights_of_other_sizes, "belongs to another model"),
}


@pytest.mark.parametrize(("spoil", "complaint"), CHECKPOINTS.values(), ids=list(CHECKPOINTS))
@pytest.mark.parametrize("verb", ["extract", "eval", "load", "info"])
def test_unusable_checkpoints(
    home: Home, capsys: pytest.CaptureFixture[str], verb: str, spoil: Callable[[Path], None], complaint: str
) -> None:
    if (verb, spoil) == ("info", weights_of_other_sizes):
        pytest.skip("info builds no model")
    spoil(home.checkpoint)
    arguments = {
        "load": [*home.arguments("train"), "--load", home.checkpoint],
        "info": ["info", home.checkpoint],
    }
    check_fails(
        capsys, home, arguments[verb] if verb in arguments else home.arguments(verb), home.checkpoint, complaint
    )


def test_load_of_another_model(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(home.folder / "other.safetensors", replace(TINY, hidden=12))
    arguments = [*home.arguments("train"), "--load", home.folder / "other.safetensors"]
    check_fails(capsys, home, arguments, "other.safetensors", "belongs to another model than spexplus of this config")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("verb", ["extract", "eval", "load", "resume", "resume of a run"])
def test_code_in_a_checkpoint_is_not_run(
    home: Home, capsys: pytest.CaptureFixture[str], verb: str, zipped: bool
) -> None:
    trace, path = home.folder / "trace", home.folder / "bad.pth"
    torch.save({"state_dict": {"a": Malicious(trace)}}, path, _use_new_zipfile_serialization=zipped)
    if verb == "resume of a run":
        shutil.copy(path, home.folder / "good.resume.pt")
    arguments = {
        "extract": [*home.arguments("extract")[:-1], path],
        "eval": ["eval", "-r", path, *home.arguments("eval")[3:]],
        "load": [*home.arguments("train"), "--load", path],
        "resume": [*home.arguments("train"), "-r", path],
        "resume of a run": [*home.arguments("train"), "-r", home.checkpoint],
    }[verb]
    check_fails(capsys, home, arguments, "good.resume.pt" if verb == "resume of a run" else path)
    assert not trace.exists()


def test_resuming_without_a_resume_file(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    check_fails(capsys, home, [*home.arguments("train"), "-r", home.checkpoint], "good.resume.pt", "beside it")
    check_fails(capsys, home, ["train", "-r", home.checkpoint], home.folder / "config.json", "No such file")
    torch.save({"epoch": 3}, home.folder / "good.resume.pt")
    check_fails(capsys, home, [*home.arguments("train"), "-r", home.checkpoint], "good.resume.pt: not a resume file")


def test_resuming_another_model(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, *home.arguments("train")).status == 0
    last = home.folder / "runs" / "toy" / "last.safetensors"
    before = home.files()
    arguments = [*home.arguments("train"), "-r", last, "--set", "model.hidden=12"]
    check_error(command(capsys, *arguments), "last.resume.pt", "was made with other settings (model.hidden)")
    data = last.with_name("last.resume.pt").read_bytes()
    assert home.files() == before
    last.with_name("last.resume.pt").write_bytes(data[: len(data) // 2])
    check_error(command(capsys, "train", "-r", last), "last.resume.pt: not a readable checkpoint")


# Writing --------------------------------------------------------------------------------------------------------


FULL = "cannot be written (File too large); free space or choose another place"


ON_A_FULL_DISK = """
import sys
from onevoice.cli import main
from tiny import full_disk
with full_disk(20_000):
    main(sys.argv[1:])
"""


def test_full_disk_for_extract(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    before = home.files()
    with full_disk(20_000):
        check_fails(capsys, home, home.arguments("extract"), home.folder / "out.wav", FULL)
    check_error(forked_process(["-c", ON_A_FULL_DISK, *home.arguments("extract")]), home.folder / "out.wav", FULL)
    assert home.files() == before


def test_full_disk_for_the_report(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    before = home.files()
    with full_disk(100):
        done = command(capsys, *home.arguments("eval"))
    check_error(done._replace(err=done.err.splitlines(keepends=True)[-1]), home.folder / "result.", FULL)
    assert home.files() == before
    assert "SI-SDR" in done.out  # the results were printed first


@pytest.mark.parametrize("size", [10, 20_000, 40_000])
def test_full_disk_in_training(home: Home, capsys: pytest.CaptureFixture[str], size: int) -> None:
    """The disk is full at the first file, the first checkpoint or the second: files are whole, and a rerun works."""
    before = home.files()
    with full_disk(size):
        done = command(capsys, *home.arguments("train"))
    check_error(done._replace(err=done.err[done.err.index("onevoice: error") :]), FULL)
    after = home.files()
    assert {path: after[path] for path in before} == before
    assert not list(home.folder.rglob("*.part"))
    assert not list(home.folder.rglob("runs/**/*.resume.pt"))
    found = list(home.folder.rglob("runs/**/*.safetensors"))
    assert len(found) == (size == 40_000)
    for path in found:
        load_model(path)
    assert command(capsys, *home.arguments("train")).status == 0


@pytest.mark.parametrize(
    ("place", "complaint"),
    [("file/out.wav", "cannot be written"), ("out.xyz", "unknown extension '.xyz'"), ("out", "unknown extension")],
)
@pytest.mark.parametrize("option", ["output", "residual"])
def test_places_for_extract(
    home: Home, capsys: pytest.CaptureFixture[str], place: str, complaint: str, option: str
) -> None:
    (home.folder / "file").write_text("x")
    arguments = home.arguments("extract")
    if option == "output":
        arguments[3] = home.folder / place
    else:
        if place.startswith("file"):
            pytest.skip("the output is written by then, whole")
        arguments += ["--residual", home.folder / place]
    check_fails(capsys, home, arguments, home.folder / place, complaint)


def test_output_and_residual_of_one_name(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    out = home.folder / "out.wav"
    check_fails(capsys, home, [*home.arguments("extract"), "--residual", out], out, "give them two names")


def test_opus_at_an_unsupported_rate(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(home.mixture, Voice.number(0).say(0, 1.0, 11_025), 11_025)
    arguments = home.arguments("extract")
    arguments[3] = home.folder / "out.opus"
    check_fails(capsys, home, arguments, "out.opus: cannot be encoded at 11025 Hz", "use .wav or .flac")


@pytest.mark.parametrize(("name", "complaint"), [("file/r.json", "cannot be written"), ("r.csv", "must end in .json")])
def test_places_for_the_report(home: Home, capsys: pytest.CaptureFixture[str], name: str, complaint: str) -> None:
    (home.folder / "file").write_text("x")
    before = home.files()
    arguments = home.arguments("eval")
    arguments[arguments.index("-o") + 1] = home.folder / name
    done = command(capsys, *arguments)
    check_error(done._replace(err=done.err.splitlines(keepends=True)[-1]), complaint)
    assert home.files() == before


def test_a_runs_folder_that_is_a_file(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (home.folder / "file").write_text("x")
    arguments = [*home.arguments("train"), "--set", f"runs_folder={home.folder / 'file'}"]
    check_fails(capsys, home, arguments, home.folder / "file" / "toy", "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (home.folder / "closed").mkdir(mode=0o500)
    arguments = home.arguments("extract")
    arguments[3] = home.folder / "closed" / "out.wav"
    check_fails(capsys, home, arguments, home.folder / "closed" / "out.wav", "cannot be written (Permission denied)")


def test_a_used_run_folder(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, *home.arguments("train")).status == 0
    before = home.files()
    check_error(command(capsys, *home.arguments("train")), "already holds a run; resume it with --r")
    assert home.files() == before


# Packages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "metric"), [("pesq", "pesq"), ("pystoi", "stoi"), ("fast_bss_eval", "sdr")])
def test_a_missing_package_of_evaluation(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, metric: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    arguments = [*home.arguments("eval"), metric]
    check_fails(capsys, home, arguments, f"evaluation needs {package}", 'pip install "onevoice[eval]"')


@pytest.mark.parametrize(
    ("package", "setting"),
    [("tensorboard", "tracking.tensorboard=true"), ("wandb", 'tracking.wandb={"project": "p", "mode": "offline"}')],
)
def test_a_missing_package_of_tracking(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, setting: str
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    check_fails(capsys, home, [*home.arguments("train"), "--set", setting], package, "pip install")
