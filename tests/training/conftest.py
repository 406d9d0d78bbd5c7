"""A finished run of the toy experiment, shared by the tests that only read it."""

from pathlib import Path

import pytest
from toy_runs import experiment, quiet

from onevoice.training.run import train


@pytest.fixture(scope="session")
def finished(trials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run: twelve steps in two epochs."""
    return train(experiment(trials, tmp_path_factory.mktemp("finished")), echo=quiet)
