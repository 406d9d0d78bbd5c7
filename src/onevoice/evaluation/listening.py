"""Listening by machine: what SI-SDR does not tell, as more numbers of a trial.

    similarity   whether the estimate sounds like the enrolled person or like the interferer, by our own encoder
    dnsmos       how clean it sounds without any reference: DNSMOS P.835 (Reddy et al., ICASSP 2022, arXiv 2110.01763)
    word errors  whether a recognizer of the user's choice understands it: `transcribe(samples, sample_rate) -> text`

Each of them is a function from a `Heard` trial to numbers by the name of their column. A number that is not defined for
a trial is None: the similarity of silence, the word errors of a trial without a text.
"""

import csv
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from onevoice.audio import Mono, resample
from onevoice.errors import ConfigError, CorpusError, MissingDependencyError
from onevoice.extraction.discovery import RATE, embed_stretches
from onevoice.files import package_file

Kind = Literal["similarity", "dnsmos"]
"""What listens without knowing what was said."""
Numbers = dict[str, float | None]
Transcribe = Callable[[Mono, int], str]
"""A recognizer: samples and their rate in Hz in, text out."""

DNSMOS_RATE = 16_000
DNSMOS_SECONDS = 9.01
"""Length of the windows that its network was trained on; they begin one second apart."""
DNSMOS_SCALES: Mapping[str, tuple[float, float, float]] = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}
"""The order of the network's outputs, and the polynomials that map them to opinion scores (from the speechmos package).
"""
LOWER_IS_BETTER = frozenset({"wer", "similarity_interferer", "interferer_improvement_db"})
"""Columns in which a smaller number is the better one."""
ABOUT_TRIALS = frozenset(
    {"words", "mixture_wer", "target_wer", "similarity_target", "similarity_mixture"}
    | {f"mixture_dnsmos_{name}" for name in DNSMOS_SCALES}
)
"""Columns that describe a trial and not its estimate."""


class Heard(NamedTuple):
    """One trial as sound, all at one rate; all but the enrollment have the same length."""

    name: str
    estimate: Mono
    target: Mono
    mixture: Mono
    enrollment: Mono
    sample_rate: int


Listener = Callable[[Heard], Numbers]


def make_listener(
    kinds: Sequence[Kind], asr: str | None, texts: str | Path | None, names: Iterable[str], sample_rate: int
) -> Listener:
    """Return a function that gives all chosen numbers of a trial.

    `asr` is MODULE:NAME of a recognizer and `texts` the file with what is said in each trial; `names` are those of the
    trials. Checks everything before any work: raises `ConfigError`, `CorpusError`, and `MissingDependencyError`.
    """
    listeners: list[Listener] = []
    if "similarity" in kinds:
        listeners.append(similarity)
    if "dnsmos" in kinds:
        if sample_rate != DNSMOS_RATE:
            raise ConfigError(f"dnsmos: is defined at {DNSMOS_RATE} Hz, and the estimates are at {sample_rate} Hz")
        listeners.append(functools.partial(_dnsmos_columns, _load_dnsmos()))
    if (asr is None) != (texts is None):
        raise ConfigError("asr, texts: set both; word errors need a recognizer (MODULE:NAME) and what was said")
    if asr is not None and texts is not None:
        said = read_texts(Path(texts))
        if not any(name in said for name in names):
            raise CorpusError(f"{texts}: has the text of none of the trials; its column `trial` must hold their names")
        listeners.append(functools.partial(word_errors, load_recognizer(asr), said, _load_jiwer()))
    return lambda heard: {name: value for listener in listeners for name, value in listener(heard).items()}


def similarity(heard: Heard) -> Numbers:
    """Return the cosine between speaker embeddings: of the estimate to the enrollment and to the interferer.

    The interferer is the mixture without the target. `similarity_target`, of the target to the enrollment, is what a
    perfect estimate would have, and `similarity_mixture` what doing nothing has. The encoder is always the one of
    `extraction.discovery`, whatever network extracts.
    """
    sounds = {
        "enrollment": heard.enrollment,
        "estimate": heard.estimate,
        "interferer": heard.mixture - heard.target,
        "target": heard.target,
        "mixture": heard.mixture,
    }
    known = {name: _embed(sound, heard.sample_rate) for name, sound in sounds.items()}

    def cosine(one: str, other: str) -> float | None:
        a, b = known[one], known[other]
        return None if a is None or b is None else float(a @ b)

    return {
        "similarity": cosine("estimate", "enrollment"),
        "similarity_interferer": cosine("estimate", "interferer"),
        "similarity_target": cosine("target", "enrollment"),
        "similarity_mixture": cosine("mixture", "enrollment"),
    }


def _embed(sound: Mono, sample_rate: int) -> np.ndarray | None:
    """Return the embedding of all of a sound; None for silence."""
    if not sound.any():
        return None
    return np.asarray(embed_stretches([resample(sound, sample_rate, RATE)])[0])


def dnsmos(sound: Mono, session: Any) -> Numbers:
    """Return DNSMOS P.835 of a sound at 16 kHz: speech (`sig`), background (`bak`) and overall (`ovrl`), 1 to 5.

    As the speechmos package does, it repeats a short sound until it fills a window, and averages over windows. It has
    no value for silence or samples beyond full scale, for which it was not trained.
    """
    if not sound.any() or float(np.abs(sound).max()) > 1:
        return dict.fromkeys(DNSMOS_SCALES)
    size = int(DNSMOS_SECONDS * DNSMOS_RATE)
    while len(sound) < size:
        sound = np.concatenate([sound, sound])
    count = int(len(sound) // DNSMOS_RATE - DNSMOS_SECONDS) + 1
    starts = range(0, count * DNSMOS_RATE, DNSMOS_RATE)
    windows = [sound[start : start + size] for start in starts]
    raw = np.stack([session.run(None, {"input_1": window[None].astype(np.float32)})[0][0] for window in windows])
    return {
        name: float(np.polyval(scale, raw[:, column]).mean())
        for column, (name, scale) in enumerate(DNSMOS_SCALES.items())
    }


def _dnsmos_columns(session: Any, heard: Heard) -> Numbers:
    sounds = {"": heard.estimate, "mixture_": heard.mixture}
    return {
        f"{prefix}dnsmos_{name}": value
        for prefix, sound in sounds.items()
        for name, value in dnsmos(sound, session).items()
    }


def _load_dnsmos() -> Any:
    path = package_file("speechmos", "dnsmos_models/sig_bak_ovr.onnx")
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        path = None
    if path is None:
        raise MissingDependencyError(
            'dnsmos needs speechmos, whose files hold the network, and onnxruntime: pip install "onevoice[dnsmos]"'
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def word_errors(transcribe: Transcribe, texts: Mapping[str, str], jiwer: Any, heard: Heard) -> Numbers:
    """Return the word error rates of what a recognizer makes of estimate, mixture and target, and the words said.

    A rate is (substitutions + deletions + insertions) / words; a mean over trials is weighted with `words`.
    """
    said = normalize_text(texts.get(heard.name, ""))
    sounds = {"wer": heard.estimate, "mixture_wer": heard.mixture, "target_wer": heard.target}
    if not said or not heard.target.any():
        return {"words": None, **dict.fromkeys(sounds)}
    rates = {}
    for name, sound in sounds.items():
        try:
            text = transcribe(sound, heard.sample_rate)
        except Exception as error:
            raise ConfigError(f"asr: the recognizer failed on {heard.name} ({error!r}); try it alone") from error
        if not isinstance(text, str):
            raise ConfigError(f"asr: the recognizer returned {type(text).__name__} for {heard.name}; return a str")
        heard_text = normalize_text(text)
        rates[name] = float(jiwer.wer(said, heard_text)) if heard_text else 1.0
    return {"words": float(len(said.split())), **rates}


def pool_word_errors(rows: Iterable[Numbers]) -> Numbers:
    """Return the word error rates of a whole set, errors over words, as recognizers are compared; {} without any."""
    known = [row for row in rows if row.get("words")]
    words = sum(row["words"] or 0 for row in known)
    return {
        name: sum((row[name] or 0) * (row["words"] or 0) for row in known) / words
        for name in ("wer", "mixture_wer", "target_wer")
        if known
    }


def normalize_text(text: str) -> str:
    """Return a text in small letters, without punctuation other than apostrophes within words, with single spaces."""
    words = re.sub(r"[^\w\s']|_", " ", text.casefold().replace("’", "'")).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def read_texts(path: Path) -> dict[str, str]:
    """Read what is said in each trial: CSV with the columns `trial` and `text`, or such objects as lines of JSON.

    Raises `CorpusError`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if path.suffix.lower() == ".csv" else map(json.loads, filter(str.strip, file))
            return {str(row["trial"]): str(row["text"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise CorpusError(
            f"{path}: does not name the text of each trial ({error!r}); write CSV with the header trial,text, "
            'or lines like {"trial": "NAME", "text": "what is said"}'
        ) from error


def load_recognizer(name: str) -> Transcribe:
    """Return the function MODULE:NAME; modules in the current folder are found too. Raises `ConfigError`."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"asr: {name!r} is not MODULE:NAME, such as my_recognizer:transcribe for my_recognizer.py")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"asr: {name} cannot be loaded ({error}); check the names, and that it is installed"
        ) from error
    if not callable(found):
        raise ConfigError(f"asr: {name} is not a function; name one that takes samples and their rate in Hz")
    transcribe: Transcribe = found
    return transcribe


def _load_jiwer() -> Any:
    try:
        return importlib.import_module("jiwer")
    except ImportError as error:
        raise MissingDependencyError('word errors need jiwer: pip install "onevoice[asr]"') from error
