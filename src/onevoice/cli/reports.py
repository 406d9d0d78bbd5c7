"""The verb that shows results as a page: `report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from onevoice.errors import ConfigError

GROUP = Group("Look at results", sort_key=4)
"""The heading of this verb in the help."""


def report(
    run: str | None = None,
    *,
    output: Annotated[Path, Parameter(name=["--output", "--o", "-o"])] = Path("report.html"),
    evaluation: Path | None = None,
    device: str = "auto",
) -> None:
    """Write one HTML page about a training run or about weights; it opens in any browser, without a network.

    The page of a run has its curves, checkpoints, validation trials with players and spectrograms, and settings. The
    page of weights has their card and what they make of the sample recordings.

    Args:
        run: A run folder, or the weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO. By default,
            the weights that come with onevoice.
        output: The page to write.
        evaluation: For weights: also show this result, a JSON file written by onevoice eval --output.
        device: For weights: where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.files import atomic_write, require_writable

    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{output}: must end in .html; it is a page for a browser")
    require_writable(output)
    if run is not None and Path(run).is_dir():
        if evaluation is not None:
            raise ConfigError("--evaluation belongs to weights; name a checkpoint instead of a run folder")
        from onevoice.training.report import run_report

        html = run_report(Path(run))
    else:
        from onevoice.evaluation.report import weights_report
        from onevoice.extraction.checkpoint import resolve
        from onevoice.extraction.extractor import load

        html = weights_report(load(run, device=device), resolve(run).stem, evaluation)
    atomic_write(output, html.encode())
    print(output)
