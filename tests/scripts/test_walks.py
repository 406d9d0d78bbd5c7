"""A reader enters few files on the way through the package (docs/architecture.md)."""

from pathlib import Path

import pytest
from tiny import ROOT
from walks import WALKS


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_enters_few_files(name: str, tmp_path: Path) -> None:
    walk, limit = WALKS[name]
    assert 0 < len(walk(tmp_path)) <= limit


@pytest.mark.parametrize("name", WALKS)
def test_the_architecture_page_names_what_a_walk_enters(name: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Three walks")[1]
    walk, _ = WALKS[name]
    missing = [file for file in walk(tmp_path) if file not in text and file not in ("config.py",)]
    assert not missing
