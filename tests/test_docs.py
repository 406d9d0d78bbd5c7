"""The documentation is true: its commands run, its pages are complete, its generated pages are current.

Blocks fenced as `sh` or `python` in the README and in docs/ run here, in the order of the page, in one temporary folder
per page that has `mixture.wav` and `enrollment.wav`, a folder `meetings` with another mixture, and the repository's
`configs` and `tests`. A line of an `sh` block is one command: `onevoice …` or `python3 SCRIPT …`. Commands that need
real data, a GPU, or a long time are fenced as `console`, and output as `text`; neither runs.
"""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import make_docs
import pytest
from tiny import ROOT, process

from onevoice.audio import read_audio, write_audio
from onevoice.cli import main
from onevoice.evaluation.demo import SAMPLES

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OWN_TEST = {"add_a_network.md", "serve.md"}
"""Pages with a test of their own."""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONGEST_LINE = 120
SHORTER = {
    "--speakers 20": "--speakers 4",
    "--speakers 6": "--speakers 3",
    "--count 1200": "--count 4",
    "--count 20": "--count 2",
    "--minutes 1": "--set training.epochs=2 training.steps_per_epoch=1 data.batch_size=2 data.workers=0",
    "-o result.json": "-o result.json --metrics si_sdr stoi",
}
"""What the tests change in the commands, to finish in seconds."""


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return FENCE.findall(path.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, one per line; a backslash joins lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> None:
    """Run a command in this process; it must end with status 0."""
    program, *arguments = words
    status: object = 0
    try:
        if program == "onevoice":
            main(arguments)
        else:
            assert program == "python3", f"an `sh` block holds {program}: fence it as `console` if it cannot run here"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code or 0
    assert status == 0, " ".join(words)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name."""
    (tmp_path / "meetings").mkdir()
    for name, copy in (("mixture", "mixture"), ("enrollment", "enrollment"), ("mixture", "meetings/monday")):
        samples, rate = read_audio(SAMPLES / f"{name}.flac")
        write_audio(tmp_path / f"{copy}.wav", samples[: 2 * rate], rate)
    for name in ("train.py", "eval.py", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # commands start no processes, which would take seconds each
    return tmp_path


RUNNABLE = [
    page for page in PAGES if page.name not in OWN_TEST and any(kind in ("sh", "python") for kind, _ in blocks(page))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, place: Path) -> None:
    names: dict[str, object] = {}
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
        elif kind == "sh":
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            for words in commands(text):
                run_command(words)


def test_what_is_shortened_is_in_the_pages() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in RUNNABLE)
    assert [long for long in SHORTER if long not in text] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "pytest" in line and "pip" in line]
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("page", sorted(make_docs.PAGES))
def test_generated_pages_are_current(page: str) -> None:
    current = (DOCS / page).read_text(encoding="utf-8")
    assert current == make_docs.PAGES[page](), "run: python3 scripts/make_docs.py"


def test_every_setting_is_described() -> None:
    rows = [line for line in make_docs.settings().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize(
    "page",
    [page for page in TEXTS if page.name not in make_docs.PAGES],
    ids=lambda page: page.name,
)
def test_lines_are_wrapped(page: Path) -> None:
    """Rows of tables, links, and fenced or indented text may be longer."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    long = [
        line
        for line in prose.splitlines()
        if len(line) > LONGEST_LINE and not line.startswith(("|", "    ")) and "](" not in line
    ]
    assert long == []


LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """The strict build checks the links between the pages of docs/."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


def places(nav: object) -> Iterator[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from places(part)


def test_every_page_is_in_the_navigation() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(places(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; any broken link, anchor, or API name fails the strict build."""
    pytest.importorskip("zensical", reason='the documentation needs pip install "onevoice[docs]"')
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    (folder / "src").symlink_to(ROOT / "src")
    with contextlib.chdir(folder):
        done = process(["-m", "zensical", "build", "--strict"])
    assert done.status == 0, done.out + done.err
    return folder / "site"


def test_the_site_builds(site: Path) -> None:
    pages = {str(page.relative_to(DOCS).with_suffix(".html")).replace("README", "index") for page in DOCS.rglob("*.md")}
    assert {str(page.relative_to(site)) for page in site.rglob("*.html")} == pages | {"404.html"}
    api = (site / "api.html").read_text(encoding="utf-8")
    assert "enrollment_sample_rate" in api


def test_no_page_loads_from_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert loaded == [], page.name
