"""The shape of the package: imports go down, foreign libraries have one door, nothing is too long, help is instant."""

import ast
import importlib.util
import json
import tomllib
from functools import cache
from pathlib import Path

import pytest
from tiny import ROOT, process

import onevoice

SOURCE = ROOT / "src" / "onevoice"
ROOMS = ("corpus", "mixing", "trials", "models", "report", "extraction", "evaluation", "training", "server", "cli")


def read_order() -> list[str]:
    """The modules in the order of the tree in docs/architecture.md; each imports only those before it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order, room = [], ""
    for line in text.split("src/onevoice/\n", 1)[1].split("```", 1)[0].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if name.endswith("/"):
            room = name.removesuffix("/")
        else:
            parts = [*([room] if indent > 2 else []), name.removesuffix(".py")]
            order.append(".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))
    return order


FLOORS = read_order()

DOORS = {
    "soundfile": {"audio"},
    "soxr": {"audio"},
    "safetensors": {"extraction.checkpoint"},
    "huggingface_hub": {"extraction.checkpoint"},
    "pesq": {"evaluation.metrics"},
    "pystoi": {"evaluation.metrics"},
    "fast_bss_eval": {"evaluation.metrics"},
    "pyarrow": {"evaluation.results"},
    "jiwer": {"evaluation.listening"},
    "onnxruntime": {"evaluation.listening", "extraction.onnx"},
    "wandb": {"training.tracking"},
    "torch.utils.tensorboard": {"training.tracking"},
    "jinja2": {"report.page"},
    "markupsafe": {"report", "training.report", "evaluation.report", "evaluation.weights"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "python_multipart": {"server"},
    "prometheus_client": {"server"},
    "sounddevice": {"extraction.live"},
    "pipecat": {"extraction.pipecat"},
    "livekit": {"extraction.livekit"},
    "cyclopts": {"cli"},
    "ray": {"cluster"},
    "fsspec": {"addresses"},
}
"""The modules that may import a foreign library."""

LONGEST_FILE = 400
LONGEST_FUNCTION = 45
"""Lines of the body that hold code: docstring, comments and empty lines are free."""


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below `onevoice`; a package's __init__ under the name of the package."""
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports anywhere in it, also inside functions: full dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return frozenset(found)


@cache
def own_imports(name: str) -> frozenset[str]:
    """The modules of the package that a module imports."""
    below = {each.removeprefix("onevoice.") for each in imports(name) if each.startswith("onevoice.")}
    return frozenset(below & modules().keys()) - {name}


@cache
def reaches(name: str) -> frozenset[str]:
    """The modules that are loaded with this one."""
    found: set[str] = set()
    todo = {name}
    while todo:
        found |= todo
        todo = {each for done in todo for each in own_imports(done)} - found
    return frozenset(found)


def room(name: str) -> str:
    return name.split(".")[0]


def test_the_map_lists_every_module_once() -> None:
    assert sorted(FLOORS) == sorted(modules())


def test_few_rooms_and_few_modules_beside_them() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    assert len(ROOMS) <= 10
    assert len([path for path in SOURCE.iterdir() if path.suffix == ".py"]) <= 12


@pytest.mark.parametrize("name", list(modules()))
def test_imports_only_go_down(name: str) -> None:
    upward = [each for each in own_imports(name) if FLOORS.index(each) >= FLOORS.index(name)]
    assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("name", [name for name in modules() if room(name) == "models"])
def test_networks_know_nothing_of_data(name: str) -> None:
    assert {room(each) for each in reaches(name)} <= {"models", "config", "units", "errors"}


@pytest.mark.parametrize("name", [name for name in modules() if room(name) in ("corpus", "mixing", "trials")])
def test_data_know_nothing_of_networks(name: str) -> None:
    assert not {room(each) for each in reaches(name)} & {"models", "extraction", "evaluation", "training"}


@pytest.mark.parametrize("name", [name for name in modules() if room(name) == "report"])
def test_pages_know_nothing_of_what_they_show(name: str) -> None:
    assert {room(each) for each in reaches(name)} <= {"report", "audio", "files", "errors"}


@pytest.mark.parametrize("name", [name for name in modules() if room(name) in ("extraction", "evaluation")])
def test_using_and_judging_never_import_learning(name: str) -> None:
    assert "training" not in {room(each) for each in reaches(name)}


def doors_of(imported: str) -> set[str] | None:
    return next((doors for library, doors in DOORS.items() if f"{imported}.".startswith(f"{library}.")), None)


def test_foreign_libraries_have_one_door() -> None:
    for name in modules():
        for each in imports(name):
            doors = doors_of(each)
            assert doors is None or name in doors or room(name) in doors, f"{name} imports {each}"


def test_the_doors_are_in_use() -> None:
    """A wrong name in DOORS would guard nothing."""
    used = {each for name in modules() for each in imports(name)}
    for library in DOORS:
        assert any(f"{each}.".startswith(f"{library}.") for each in used) or library in (
            "pesq",
            "pystoi",
            "fast_bss_eval",
            "wandb",
            "torch.utils.tensorboard",
        ), library


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if not body:
        return 0
    text = (line.strip() for line in lines[body[0].lineno - 1 : body[-1].end_lineno])
    return sum(bool(line) and not line.startswith("#") for line in text)


@pytest.mark.parametrize("name", list(modules()))
def test_files_and_functions_are_short(name: str) -> None:
    text = modules()[name].read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node, lines) <= LONGEST_FUNCTION, f"{node.name} in line {node.lineno}"


def test_code_lines_are_counted() -> None:
    text = 'def f():\n    """A\n    docstring."""\n    # comment\n    a = 1\n\n    return (\n        a\n    )\n'
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function, text.splitlines()) == 4


HELP = """
import io, json, sys, contextlib
from onevoice.cli import main
for verb in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*verb.split(), "--help"])
        except SystemExit as leaving:
            assert not leaving.code, leaving.code
    heavy = {"torch", "numpy", "soundfile", "pydantic", "pesq"} & sys.modules.keys()
    print(json.dumps([verb, sorted(heavy), out.getvalue()]))
"""
VERBS = ["", "mix", "train", "eval", "extract", "demo", "info", "serve", "report", "compare", "average", "schema"]


@pytest.fixture(scope="module")
def help_texts() -> dict[str, tuple[list[str], str]]:
    """For each verb, the heavy packages that are loaded after its help, and the text; one process prints all."""
    done = process(["-c", HELP, json.dumps(VERBS)])
    assert (done.status, done.err) == (0, "")
    return {verb: (heavy, text) for verb, heavy, text in map(json.loads, done.out.splitlines())}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_there_at_once(help_texts: dict[str, tuple[list[str], str]], verb: str) -> None:
    heavy, text = help_texts[verb]
    assert heavy == []
    assert f"Usage: onevoice {verb}".strip() in text


def test_importing_has_no_effects() -> None:
    """Nothing heavy for the package itself; and with all of it no thread count, seed, filter or log handler moves."""
    done = process(["-c", "import sys, onevoice; print({'torch', 'numpy', 'soundfile'} & sys.modules.keys())"])
    assert (done.out, done.err) == ("set()\n", "")
    missing = {f"extraction.{name}" for name in ("pipecat", "livekit") if importlib.util.find_spec(name) is None}
    names = [f"onevoice.{name}" for name in modules() if not name.startswith("__") and name not in missing]
    code = f"""
import importlib, logging, os, random, warnings
import numpy, pydantic, soundfile, soxr, torch, torch.utils.data, tqdm, cyclopts, jaxtyping
import safetensors.torch

def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), list(warnings.filters),
        logging.getLogger().handlers, logging.getLogger().level, random.getstate(), repr(numpy.random.get_state()),
        numpy.geterr(), dict(os.environ), os.getcwd(), torch.get_rng_state().tolist(),
    ]

before = state()
for name in {names!r}:
    importlib.import_module(name)
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
"""
    done = process(["-c", code])
    assert (done.status, done.out, done.err) == (0, "", "")


def test_the_public_names() -> None:
    code = "import onevoice; [getattr(onevoice, name) for name in onevoice.__all__]; print(sorted(onevoice.__all__))"
    done = process(["-c", code])
    assert (done.status, done.err) == (0, "")
    names = {
        "load",
        "Extractor",
        "MixtureGenerator",
        "MultiLoss",
        "OnevoiceError",
        "SpExPlus",
        "SpExPlusConfig",
        "separate",
        "onnx",
    }
    assert {*names, "__version__"} == set(ast.literal_eval(done.out))


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert onevoice.__version__ == project["version"]
    assert "__version__" in dir(onevoice)
