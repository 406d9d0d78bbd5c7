"""Every test runs with shapes and types of the package checked at each call (jaxtyping with beartype)."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as there are cores

from jaxtyping import install_import_hook

hook = install_import_hook("onevoice", "beartype.beartype")
hook.__enter__()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests were started from


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that leaves another number of threads behind would change the last bits of the tests after it."""
    import torch  # here, because the process that hands out the tests needs none of it

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four toy speakers with four utterances of 4 s at 8 kHz, in the layout of LibriSpeech."""
    from voices import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 toy trials of 1 s with four speakers."""
    from voices import make_trials

    return make_trials(tmp_path_factory.mktemp("trials"), 24)
