"""Follow three walks through the package and count the files they enter: python3 scripts/walks.py [--functions]

recording → gradient    one training step on a batch drawn from a pack, with its log line
command → voice         load the default weights, and extract a voice from one file into another
config → number         score a folder of trials, from `evaluate` to the printed lines, with weights that are loaded

A walk enters a file when it calls one of its functions. With --functions the first calls into each file are listed, in
order. Generated toy voices stand in for recordings.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "onevoice"
sys.path.insert(0, str(ROOT / "tests"))

Walk = dict[str, list[str]]
"""The functions that a walk calls first, by file, both in order."""


def follow(run: Callable[[], Any], functions_per_file: int = 4) -> Walk:
    """Call `run` and return the files of the package that it enters; comprehensions and lambdas count as files only."""
    walk: Walk = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(SOURCE)) or code.co_name == "<module>":
            return
        functions = walk.setdefault(Path(code.co_filename).relative_to(SOURCE).as_posix(), [])
        name = code.co_qualname
        if "<" not in name and name not in functions and len(functions) < functions_per_file:
            functions.append(name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return walk


def training_step(folder: Path) -> Walk:
    """Follow the second step of a tiny experiment, whose batches are drawn from a pack."""
    from tiny import TINY
    from voices import make_corpus, make_trials

    from onevoice.config import from_dict, to_dict
    from onevoice.corpus.listing import list_corpus
    from onevoice.corpus.packing import pack_corpus
    from onevoice.training.experiment import Experiment
    from onevoice.training.run import Trainer

    pack_corpus(list_corpus([make_corpus(folder / "corpus")]), folder / "pack", sample_rate=8000)
    values = {
        "name": "walk",
        "runs_folder": str(folder / "runs"),
        "model": {**to_dict(TINY), "num_classes": 0},
        "data": {
            "train": {"kind": "dynamic", "pack": str(folder / "pack"), "mixing": {"segment_seconds": 0.5}},
            "validation": {"folder": str(make_trials(folder / "trials", 2))},
            "batch_size": 2,
            "workers": 0,
        },
        "training": {"log_every_steps": 1, "ema": 0.9, "device": "cpu"},
    }
    trainer = Trainer(from_dict(Experiment, values), echo=lambda line: None)
    batches = iter(trainer.source.batches(0, 0, 2))
    trainer.learner.step(next(batches))
    return follow(lambda: trainer.learner.step(next(batches)))


def extraction(folder: Path) -> Walk:
    """Follow an extraction from the sample recordings by the default weights."""
    from onevoice.evaluation.demo import SAMPLES
    from onevoice.extraction.extractor import load
    from onevoice.extraction.recording import extract_file

    names = [str(SAMPLES / f"{name}.flac") for name in ("mixture", "enrollment")]
    return follow(lambda: extract_file(load(device="cpu"), *names, folder / "voice.wav"))


def evaluation(folder: Path) -> Walk:
    """Follow the evaluation of a tiny network on two trials."""
    from tiny import save_tiny
    from voices import make_trials

    from onevoice.evaluation.run import EvaluationConfig, evaluate
    from onevoice.evaluation.summary import format_report
    from onevoice.extraction.extractor import load

    extractor = load(save_tiny(folder / "tiny.safetensors"), device="cpu")
    config = EvaluationConfig(folder=str(make_trials(folder / "trials", 2)), jobs=1)
    return follow(lambda: format_report(evaluate(extractor, config, progress=False)))


WALKS: dict[str, tuple[Callable[[Path], Walk], int]] = {
    "recording → gradient": (training_step, 15),
    "command → voice": (extraction, 23),
    "config → number": (evaluation, 16),
}
"""Each walk, and the largest number of files it may enter."""


def main() -> None:
    """Print the walks."""
    for name, (walk, limit) in WALKS.items():
        with tempfile.TemporaryDirectory() as folder:
            entered = walk(Path(folder))
        print(f"{name}: {len(entered)} files (limit {limit})")
        for file, functions in entered.items():
            print(f"  {file:32}{', '.join(functions) if '--functions' in sys.argv else ''}".rstrip())


if __name__ == "__main__":
    main()
