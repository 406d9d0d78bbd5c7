"""The verbs that show results: `report` as a page, `compare` as differences."""

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from onevoice.errors import ConfigError

GROUP = Group("Look at results", sort_key=4)
"""The heading of these verbs in the help."""
RESULTS = (".json", ".csv", ".parquet")
"""Endings of the files of a result."""


def report(
    run: str | None = None,
    *results: Path,
    output: Annotated[Path, Parameter(name=["--output", "--o", "-o"])] = Path("report.html"),
    evaluation: Path | None = None,
    played: int = 10,
    device: str = "auto",
) -> None:
    """Write one HTML page about a training run, results, or weights; it opens in any browser, without a network.

    The page of a run has its curves, checkpoints, validation trials with players and spectrograms, and settings. The
    page of results (onevoice eval or score --output) has their metrics, groups, histograms and scatter plots, the
    differences between them, and players for the worst, best and random trials. The page of weights has their card
    and what they make of the sample recordings.

    Args:
        run: A run folder; a result (.json, or its .csv or .parquet); or the weights: a published NAME, the PATH of a
            checkpoint, or hf://OWNER/REPO. By default, the weights that come with onevoice.
        results: Further results, to show beside the first.
        output: The page to write.
        evaluation: For weights: also show this result, a JSON file written by onevoice eval --output.
        played: For results: the number of worst, best and random trials to hear, each; 0 for none.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.files import atomic_write, require_writable

    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{output}: must end in .html; it is a page for a browser")
    require_writable(output)
    is_result = run is not None and Path(run).suffix.lower() in RESULTS
    if results and not is_result:
        raise ConfigError(f"{run}: is no result (.json, .csv, .parquet), and only results are shown side by side")
    if evaluation is not None and (is_result or (run is not None and Path(run).is_dir())):
        raise ConfigError("--evaluation belongs to weights; name a checkpoint instead of a run folder or result")
    if run is not None and is_result:
        from onevoice.evaluation.report import results_report

        html = results_report([Path(run), *results], device, played)
    elif run is not None and Path(run).is_dir():
        from onevoice.training.report import run_report

        html = run_report(Path(run))
    else:
        from onevoice.evaluation.weights import weights_report
        from onevoice.extraction.checkpoint import resolve
        from onevoice.extraction.extractor import load

        html = weights_report(load(run, device=device), resolve(run).stem, evaluation)
    atomic_write(output, html.encode(errors="replace"))
    print(output)


def compare(
    *results: Path,
    by: str | None = None,
    common: bool = False,
    json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Compare results of onevoice eval or score on the same trials with the first one, trial by trial.

    For each metric it prints both means, the mean difference with its bootstrap 95 % interval, and the p of Wilcoxon's
    signed-rank test; then the best and worst trials.

    Args:
        results: The results, two or more; the first is the reference.
        by: The column that ranks the trials, such as si_sdr_improvement (the default) or pesq.
        common: Compare the trials that all results share by name, even if their lists or audio differ.
        json: Print everything as JSON, with the differences of all trials.
    """
    from json import dumps

    from onevoice.evaluation.compare import compare as compare_results
    from onevoice.evaluation.results import read_result

    if len(results) < 2:
        raise ConfigError("RESULTS: name two or more; the first one is the reference")
    comparisons = compare_results([read_result(path) for path in results], by, common=common)
    if json:
        print(dumps([each.to_dict() for each in comparisons], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(each.text() for each in comparisons))
