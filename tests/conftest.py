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


LONGEST_FIRST = (
    "test_compiled.py",
    "test_bandsplit.py",
    "test_style.py",
    "test_generator.py",
    "test_add_a_network.py",
    "test_habits.py",
    "test_page.py",
    "test_notebook.py",
    "test_recording.py",
    "test_onnx.py",
    "test_package.py",
    "test_life.py",
    "test_run.py",
    "test_step.py",
    "test_profile.py",
    "test_cli.py",
    "test_docs.py",
    "test_bad_input.py",
)
"""Files that take the most time, so that no process works on one of them alone at the end.

The two that compile come before all others: late in a long process, torch was seen to run the plain code instead.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Leave the environment, the current folder and the handlers of signals to the next test as this one found them.

    Commands set OMP_WAIT_POLICY, for instance. And a test that leaves another number of threads behind would change
    the last bits of the tests after it.
    """
    import torch  # here, because the process that hands out the tests needs none of it

    threads, folder, environment = torch.get_num_threads(), Path.cwd(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert torch.get_num_threads() == threads
    os.chdir(folder)
    for name in {*environment, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in environment:
            del os.environ[name]
        elif os.environ.get(name) != environment[name]:
            os.environ[name] = environment[name]
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
