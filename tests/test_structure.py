"""The shape of the package: imports go down, foreign libraries have one door, nothing is too long, help is instant."""

import ast
import json
from functools import cache
from pathlib import Path

import pytest
from tiny import ROOT, process

SOURCE = ROOT / "src" / "onevoice"
FLOORS = [
    # words
    "errors", "units", "memory", "rng", "files", "rows", "config", "workers", "interruption", "audio",
    # data: the speech we have, how trials are drawn and rendered
    "silence", "loudness", "rooms", "recordings", "layouts", "corpus", "manifest", "mixing_law", "mixture",
    "packed", "packing", "dynamic", "dataset", "protocols",
    # networks
    "models.base", "models.fused", "models.layers", "models.speaker", "models.spexplus", "models",
    # what both meet in
    "rendering", "loss", "metrics", "scoring", "checkpoint", "pretrained",
    # using and judging, which never import learning
    "devices", "extraction", "demo", "streaming", "export", "evaluation", "report",
    # learning
    "tracking", "experiment", "optim", "sources", "averaging", "activations", "distributed", "microbatches", "faults",
    "tally", "validation", "resuming", "learning", "training", "roofline", "profiling",
    # on top
    "server", "cli_corpus", "cli", "__main__", "__init__",
]  # fmt: skip
"""Each module imports only those before it (or, of packages, their own parts). A new module takes its place here."""

DOORS = {
    "soundfile": {"audio"},
    "soxr": {"audio"},
    "safetensors": {"checkpoint"},
    "huggingface_hub": {"pretrained"},
    "pesq": {"metrics"},
    "pystoi": {"metrics"},
    "fast_bss_eval": {"metrics"},
    "wandb": {"tracking"},
    "tensorboard": {"tracking"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "fastapi": {"server"},
    "cyclopts": {"cli", "cli_corpus"},
}
"""The modules that may import a foreign library."""

LEARNING = set(FLOORS[FLOORS.index("tracking") : FLOORS.index("profiling") + 1])
DATA = set(FLOORS[FLOORS.index("silence") : FLOORS.index("models.base")])

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
    return frozenset(below & modules().keys())


def floor(name: str) -> int:
    """The place of a module; that of its package when only the package has one."""
    return FLOORS.index(name if name in FLOORS else name.split(".")[0])


@cache
def reaches(name: str) -> frozenset[str]:
    """The modules that are loaded with this one."""
    found: set[str] = set()
    todo = {name}
    while todo:
        found |= todo
        todo = {each for done in todo for each in own_imports(done)} - found
    return frozenset(found)


def test_every_module_has_its_floor() -> None:
    homeless = [name for name in modules() if name not in FLOORS and name.split(".")[0] not in FLOORS]
    assert not homeless, f"give {homeless} a place in FLOORS"


@pytest.mark.parametrize("name", list(modules()))
def test_imports_only_go_down(name: str) -> None:
    package = name.split(".")[0]
    upward = [
        each
        for each in own_imports(name)
        if floor(each) >= floor(name) and not (floor(each) == floor(name) and each.split(".")[0] == package)
    ]
    assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("package", ["models", "protocols"])
def test_no_circles_inside_packages(package: str) -> None:
    for name in modules():
        if name.startswith(f"{package}."):
            assert package not in own_imports(name) | {
                each for one in own_imports(name) for each in reaches(one) - {one}
            }
            assert not any(name in reaches(each) for each in own_imports(name)), name


def test_networks_know_nothing_of_data() -> None:
    for name in modules():
        if name.split(".")[0] == "models":
            assert {each.split(".")[0] for each in reaches(name)} <= {"models", "config", "units", "errors"}


@pytest.mark.parametrize("name", sorted(DATA & modules().keys()))
def test_data_know_nothing_of_networks(name: str) -> None:
    assert not {each for each in reaches(name) if each.split(".")[0] in {"models", "loss", "checkpoint", *LEARNING}}


@pytest.mark.parametrize(
    "name", ["pretrained", "devices", "extraction", "demo", "streaming", "export", "evaluation", "report", "checkpoint"]
)
def test_using_and_judging_never_import_learning(name: str) -> None:
    if name in modules():
        assert not reaches(name) & LEARNING


def test_foreign_libraries_have_one_door() -> None:
    for name in modules():
        for each in imports(name):
            door = DOORS.get(each.split(".")[0])
            assert door is None or name.split(".")[0] in door, f"{name} imports {each}"


def test_the_doors_are_in_use() -> None:
    """A wrong name in DOORS would guard nothing."""
    for library in ("soundfile", "soxr", "safetensors", "huggingface_hub", "cyclopts"):
        assert any(each.split(".")[0] == library for name in DOORS[library] for each in imports(name))


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
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        main(json.loads(sys.argv[1]))
    except SystemExit as leaving:
        assert not leaving.code, leaving.code
heavy = {"torch", "numpy", "soundfile", "pydantic", "pesq"} & sys.modules.keys()
print(json.dumps([sorted(heavy), out.getvalue()]))
"""


@pytest.mark.parametrize("verb", ["", "mix", "train", "eval", "extract", "demo", "info", "average", "schema"])
def test_help_is_there_at_once(verb: str) -> None:
    done = process(["-c", HELP, json.dumps([*verb.split(), "--help"])])
    assert (done.status, done.err) == (0, "")
    heavy, text = json.loads(done.out)
    assert heavy == []
    assert f"Usage: onevoice {verb}".strip() in text


def test_importing_has_no_effects() -> None:
    """Nothing heavy for the package itself; and with all of it no thread count, seed, filter or log handler moves."""
    done = process(["-c", "import sys, onevoice; print({'torch', 'numpy', 'soundfile'} & sys.modules.keys())"])
    assert (done.out, done.err) == ("set()\n", "")
    names = [f"onevoice.{name}" for name in modules() if not name.startswith("__")]
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
    assert {"load", "Extractor", "MixtureGenerator", "MultiLoss", "OnevoiceError", "SpExPlus"} <= set(
        ast.literal_eval(done.out)
    )
