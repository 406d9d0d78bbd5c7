"""Numbers from listening: by the speaker encoder, by DNSMOS, and by a recognizer, here a stand-in."""

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import command
from voices import Voice, make_trials

from onevoice.errors import ConfigError, CorpusError, MissingDependencyError
from onevoice.evaluation import listening
from onevoice.evaluation.listening import Heard, make_listener, normalize_text, pool_word_errors, read_texts
from onevoice.evaluation.results import read_result
from onevoice.extraction.discovery import ENCODER
from onevoice.trials.reading import find_trials


def heard(estimate_share: float = 1.0, name: str = "a", seconds: float = 2.0) -> Heard:
    """Two toy speakers; the estimate has this share of the target, the rest of the interferer."""
    target, other = (Voice.number(number).say(0, seconds, 16000) for number in (1, 2))
    estimate = estimate_share * target + (1 - estimate_share) * other
    return Heard(name, estimate.astype("f4"), target, target + other, Voice.number(1).say(1, seconds, 16000), 16000)


def test_similarity_tells_the_right_voice_from_the_wrong_one() -> None:
    right, wrong = (listening.similarity(heard(share)) for share in (1.0, 0.0))
    assert right["similarity"] > right["similarity_interferer"]
    assert wrong["similarity"] < wrong["similarity_interferer"] == pytest.approx(1.0, abs=1e-4)
    assert right["similarity"] == right["similarity_target"]
    assert wrong["similarity_target"] == right["similarity_target"]
    assert all(-1 <= value <= 1 + 1e-6 for value in right.values())


def test_silence_is_nobody() -> None:
    trial = heard()
    silent = np.zeros_like(trial.target)
    found = listening.similarity(trial._replace(estimate=silent, mixture=trial.target))
    assert (found["similarity"], found["similarity_interferer"]) == (None, None)
    assert found["similarity_mixture"] == found["similarity_target"]
    absent = listening.similarity(trial._replace(target=silent))
    assert absent["similarity_target"] is None
    assert absent["similarity_interferer"] is not None


def synthetic() -> np.ndarray:
    rng = np.random.default_rng(0)
    time = np.arange(round(4.6 * 16000)) / 16000
    tone = 0.2 * np.sin(2 * np.pi * 220 * time) * (1 + np.sin(2 * np.pi * 3 * time)) / 2
    return (tone + 0.01 * rng.standard_normal(len(time))).astype("f4")


def test_dnsmos_is_that_of_its_package() -> None:
    """The numbers are those of `speechmos.dnsmos.run(sound, 16000)`, version 0.0.1.1, which needs librosa."""
    found = listening.dnsmos(synthetic(), listening._load_dnsmos())
    assert found == pytest.approx({"sig": 1.480466, "bak": 1.517953, "ovrl": 1.190621}, abs=1e-4)


class Session:
    """In place of the network: it gives the first sample, twice and three times that, and keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (window,) = inputs["input_1"]
        self.heard.append(window)
        return [window[:1, None] * np.arange(1, 4)]


def test_dnsmos_is_the_mean_over_windows_of_9_seconds() -> None:
    session = Session()
    sound = np.linspace(0, 1, 11 * 16000).astype("f4")
    found = listening.dnsmos(sound, session)
    assert [window.tolist() for window in session.heard] == [sound[first:][:144160].tolist() for first in (0, 16000)]
    ovrl = [np.polyval((-0.06766283, 1.11546468, 0.04602535), 3 * sound[first]) for first in (0, 16000)]
    assert found["ovrl"] == pytest.approx(np.mean(ovrl))
    session.heard.clear()
    listening.dnsmos(sound[:73600], session)
    assert [window.tolist() for window in session.heard] == [np.tile(sound[:73600], 2)[:144160].tolist()]
    for silent_or_loud in (0 * sound, 2 * sound):
        assert listening.dnsmos(silent_or_loud, session) == {"sig": None, "bak": None, "ovrl": None}
    assert len(session.heard) == 1


def test_dnsmos_listens_to_estimate_and_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_load_dnsmos", Session)
    estimate, mixture = np.full(100, 0.5, "f4"), np.full(100, 0.25, "f4")
    found = make_listener(["dnsmos"], None, None, [], 16000)(heard()._replace(estimate=estimate, mixture=mixture))
    assert list(found) == [f"{prefix}dnsmos_{name}" for prefix in ("", "mixture_") for name in ("sig", "bak", "ovrl")]
    assert found["dnsmos_sig"] == pytest.approx(np.polyval(listening.DNSMOS_SCALES["sig"], 0.5))
    assert found["mixture_dnsmos_sig"] == pytest.approx(np.polyval(listening.DNSMOS_SCALES["sig"], 0.25))


@pytest.fixture
def recognizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in, in a module of the current folder: it understands a sound as well as it resembles the target."""
    (tmp_path / "stand_in.py").write_text(
        "import numpy as np\n"
        "LOUD = 3\n"
        "def transcribe(samples, sample_rate):\n"
        "    assert (samples.dtype, sample_rate) == (np.float32, 16000)\n"
        "    return {0: '', 1: 'Hello, HELLO world', 2: 'hello world'}.get(int(samples[0]), 'hello brave new world')\n"
        "def breaks(samples, sample_rate):\n    raise RuntimeError('no memory')\n"
        "def returns_none(samples, sample_rate):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    importlib.invalidate_caches()
    return "stand_in:transcribe"


def spoken(number: int, name: str = "a") -> np.ndarray:
    return np.full(100, number, "f4")


def test_word_errors_of_estimate_mixture_and_target(recognizer: str, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text('trial,text\na,"Hello, world!"\nb,Hello world.\n')
    listen = make_listener([], recognizer, tmp_path / "texts.csv", ["a", "b", "c"], 16000)
    trial = Heard("a", spoken(1), spoken(2), spoken(3), spoken(2), 16000)
    # An insertion of one, two insertions, and nothing, in two words.
    assert listen(trial) == {"words": 2.0, "wer": 0.5, "mixture_wer": 1.0, "target_wer": 0.0}
    silent = listen(trial._replace(estimate=spoken(0)))
    assert silent["wer"] == 1.0
    unknown = listen(trial._replace(name="c"))
    assert unknown == {"words": None, "wer": None, "mixture_wer": None, "target_wer": None}
    assert listen(trial._replace(target=0 * trial.target))["wer"] is None


def test_word_errors_are_pooled_over_words() -> None:
    rows = [
        {"words": 2.0, "wer": 0.5, "mixture_wer": 1.0, "target_wer": 0.0},
        {"words": 8.0, "wer": 0.25, "mixture_wer": 1.5, "target_wer": 0.125},
        {"words": None, "wer": None, "mixture_wer": None, "target_wer": None},
        {},
    ]
    assert pool_word_errors(rows) == pytest.approx({"wer": 0.3, "mixture_wer": 1.4, "target_wer": 0.1})
    assert pool_word_errors(rows[2:]) == {}


def test_texts_from_csv_and_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufefftrial,speaker,text\n1_2,x,one two\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"trial": "1_2", "text": "one two"}\n\n')
    assert read_texts(tmp_path / "a.csv") == read_texts(tmp_path / "b.jsonl") == {"1_2": "one two"}
    for name, content in {"c.csv": "name,text\na,b\n", "d.jsonl": '["a"]\n', "e.jsonl": "a b\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(CorpusError, match=f"{name}: does not name the text of each trial"):
            read_texts(tmp_path / name)


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert normalize_text("  Don’t — STOP, 'quoted' e-mail_x: Größe!  ") == "don't stop quoted e mail x grösse"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stand_in", "'stand_in' is not MODULE:NAME"),
        ("stand_out:transcribe", "stand_out:transcribe cannot be loaded"),
        ("stand_in:nothing", "stand_in:nothing cannot be loaded"),
        ("stand_in:LOUD", "stand_in:LOUD is not a function"),
        ("stand_in:breaks", "the recognizer failed on a .*no memory"),
        ("stand_in:returns_none", "the recognizer returned NoneType for a"),
    ],
)
def test_a_wrong_recognizer_is_one_line(recognizer: str, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "t.csv").write_text("trial,text\na,b\n")
    with pytest.raises(ConfigError, match=message):
        make_listener([], name, tmp_path / "t.csv", ["a"], 16000)(
            Heard("a", spoken(1), spoken(1), spoken(1), spoken(1), 16000)
        )


def test_everything_is_checked_before_any_work(
    recognizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_text("trial,text\na,b\n")
    with pytest.raises(CorpusError, match="the text of none of the trials"):
        make_listener([], recognizer, tmp_path / "t.csv", ["b"], 16000)
    for chosen in ((recognizer, None), (None, tmp_path / "t.csv")):
        with pytest.raises(ConfigError, match="asr, texts: set both"):
            make_listener([], *chosen, ["a"], 16000)
    with pytest.raises(ConfigError, match="dnsmos: is defined at 16000 Hz"):
        make_listener(["dnsmos"], None, None, [], 8000)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name in ("jiwer", "onnxruntime"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r"onevoice\[dnsmos\]"):
        make_listener(["dnsmos"], None, None, [], 16000)
    with pytest.raises(MissingDependencyError, match=r"onevoice\[asr\]"):
        listening._load_jiwer()


def test_an_evaluation_listens(recognizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands pass everything on; the stand-in understands nothing of the toy voices but "hello"."""
    trials = make_trials(tmp_path / "trials", 3, sample_rate=16000)
    names = [trial.name for trial in find_trials(trials)]
    (tmp_path / "texts.csv").write_text(f"trial,text\n{names[0]},hello there\n{names[1]},hello\n")
    (tmp_path / "stand_in.py").write_text("def transcribe(samples, sample_rate):\n    return 'hello'\n")
    arguments = ("-t", trials, "-j", 1, "--metrics", "si_sdr", "--listen", "similarity")
    words = ("--asr", recognizer, "--texts", tmp_path / "texts.csv")
    done = command(capsys, "eval", "--baseline", "mixture", *arguments, *words, "-o", tmp_path / "r.json",
                   "--save-estimates", tmp_path / "estimates")  # fmt: skip
    assert done.status == 0, done.err
    assert "words    33.3 % errors; 33.3 % in the mixture, 33.3 % in the target" in done.out
    result = read_result(tmp_path / "r.json")
    assert [row.more["wer"] for row in result.rows] == [0.5, 0.0, None]
    for row in result.rows:
        assert row.more["similarity"] == pytest.approx(row.more["similarity_mixture"], abs=1e-6)
    assert result.summary["word_error_rates"]["wer"] == pytest.approx(1 / 3)
    assert result.summary["provenance"]["listening"]["encoder"] == ENCODER
    assert result.summary["saved_estimates"] == str(tmp_path / "estimates")
    again = command(capsys, "score", tmp_path / "estimates", trials, *arguments[2:], "-o", tmp_path / "s.json")
    assert again.status == 0, again.err
    for one, other in zip(result.rows, read_result(tmp_path / "s.json").rows, strict=True):
        assert other.more == {name: value for name, value in one.more.items() if "similarity" in name}
    done = command(capsys, "eval", "--baseline", "mixture", *arguments[:-1], "loudness")
    assert (done.status, done.err.count("\n")) == (2, 1)
