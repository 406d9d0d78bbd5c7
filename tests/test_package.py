"""The wheel: the same bytes from any folder, and everything that a bare environment needs to extract a voice."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import requires, version
from pathlib import Path
from urllib.parse import quote

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT


def build(source: Path, output: Path) -> Path:
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        place = source / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)  # with the time of now, not that of the original
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = output.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build(folder / "source", folder / "out")


def test_two_builds_have_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "elsewhere" / "source", tmp_path / "out")
    assert again.name == wheel.name
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert {name.partition("/")[0] for name in names} == {"onevoice", metadata}
    assert f"{metadata}/licenses/LICENSE" in names
    kept = {str(Path("onevoice") / path.relative_to(ROOT / "src/onevoice")) for path in package_files()}
    assert kept == {name for name in names if name.startswith("onevoice/")}


def package_files() -> list[Path]:
    files = (ROOT / "src/onevoice").rglob("*")
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def test_the_sbom_lists_all_that_is_needed(tmp_path: Path) -> None:
    """Every dependency of the package, with its version, and what it needs in turn.

    The check of the schema is left out: for hundreds of packages, it takes longer than all else.
    """
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    options = ["--output-reproducible", "--no-validate", "-o", str(tmp_path / "sbom.json")]
    subprocess.run([*command, *options], check=True, capture_output=True)
    sbom = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == "onevoice"
    listed = {each["purl"].partition("?")[0]: each["bom-ref"] for each in sbom["components"] if "purl" in each}
    graph = {each["ref"]: set(each.get("dependsOn", ())) for each in sbom["dependencies"]}
    needed = [Requirement(line) for line in requires("onevoice") or []]
    names = [canonicalize_name(each.name) for each in needed if each.marker is None]
    assert "torch" in names
    refs = {listed[f"pkg:pypi/{name}@{quote(version(name))}"] for name in names}
    assert refs <= graph[sbom["metadata"]["component"]["bom-ref"]]
    assert graph[listed[f"pkg:pypi/torch@{quote(version('torch'))}"]]


def test_a_bare_environment_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    """The wheel unpacked beside the dependencies of this environment, whose own onevoice is not seen."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare/bin/python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-m", "onevoice", "demo", "--out", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    where = [python, "-c", "import onevoice; print(onevoice.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).is_relative_to(packages)
    assert "SI-SDR" in done.stdout
    assert len(list((tmp_path / "demo").glob("*.wav"))) >= 3
