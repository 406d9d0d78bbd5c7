"""Format, lint and types, so that `pytest` alone is the whole check."""

import sys

import pytest
from tiny import ROOT, process


@pytest.mark.parametrize("tool", ["ruff format --check .", "ruff check .", "mypy"])
def test_style(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = process(["-m", *tool.split()])
    assert done.status == 0, f"{sys.executable} -m {tool}\n{done.out}{done.err}"
