"""The container: its Dockerfile is linted, and its steps run in a virtual environment, since Docker may be missing."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, command

yaml = pytest.importorskip("yaml")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def steps(word: str) -> list[str]:
    """The arguments of an instruction, wherever it appears; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^\s*{word} (.*)$", joined, re.MULTILINE)


def test_the_linter_has_nothing_to_say() -> None:
    program = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    if not Path(program).exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_is_copied_builds_a_wheel_with_weights_and_page(tmp_path: Path) -> None:
    """The build stage, without the download of what onevoice needs."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [name for line in steps("COPY") if "--from" not in line for name in line.split()[:-1]]
    assert {f"!{name}" for name in sources} <= set(ignored)
    for name in sources:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (pip,) = [line for line in steps("RUN") if "pip install" in line]
    extras = re.findall(r'"\.\[(.*)\]"', pip)[0].split(",")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("server/static/index.html", "server/static/style.css", "server/static/app.js"):
        assert f"onevoice/{name}" in names
    assert [name for name in names if name.startswith("onevoice/extraction/weights/") and name.endswith(".safetensors")]


def test_it_runs_as_nobody_special_and_needs_a_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEVOICE_TOKEN", raising=False)
    assert steps("USER")[-1] == "10001"
    program, *arguments = json.loads(steps("ENTRYPOINT")[0])
    assert program == "onevoice"
    done = command(capsys, *arguments)
    assert (done.status, "needs a token" in done.err) == (2, True)
    service = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["onevoice"]
    assert service["environment"]["ONEVOICE_TOKEN"].startswith("${ONEVOICE_TOKEN:?")
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert {volume.split(":")[1] for volume in service["volumes"]} == set(json.loads(steps("VOLUME")[0]))


def test_the_health_check(address: str) -> None:
    program, option, code = json.loads(re.findall(r"CMD (\[.*\])", DOCKERFILE)[0])
    assert (program, option) == ("python", "-c")
    assert "8000" in steps("EXPOSE")[0]
    exec(code.replace("http://127.0.0.1:8000", address), {})
    with pytest.raises(urllib.error.URLError):
        exec(code.replace("http://127.0.0.1:8000", "http://127.0.0.1:1"), {})
