"""Writes a network as ONNX graphs, which `onnx` runs without PyTorch.

    enroll.onnx   an enrollment in, its speaker embedding out
    extract.onnx  a mixture and a speaker embedding in, the estimate out
    voice.onnx    causal networks: a speaker embedding in, what the steps need of it out
    step.onnx     causal networks: one hop of samples and the state in, one hop and the next state out

Sounds are (1, samples), float32, whole multiples of `multiple_of` samples long, and centered with unit power if
`normalize_level` is true. A state input NAME belongs to the output next_NAME; at the start, all of them are zero. Each
file has the card of the weights, their hash and these facts in its metadata, as JSON under the key `onevoice`.

Band-split networks go through torch's tracing exporter, which takes a second; SpEx+ chooses by lengths, which only the
slower one can follow. Tracing could freeze a length into a graph, so each graph is compared with the network at another
length.
"""

import copy
import importlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onevoice.errors import MissingDependencyError
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.onnx import open_session
from onevoice.files import atomic_write
from onevoice.models.bandsplit import BandSplitExtractor
from onevoice.models.graphs import EnrollGraph, ExtractGraph, multiple_of
from onevoice.models.streaming import Step, VoiceTensors

OPSET = 18
MAX_DIFFERENCE = 1e-4
"""The largest difference between a graph and the network, relative to the largest value."""


class VoiceGraph(nn.Module):
    """A speaker embedding in, what the steps need of it out."""

    def __init__(self, model: BandSplitExtractor) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the voice."""
        return tuple(VoiceTensors.of(self.model, embedding))


class StepGraph(nn.Module):
    """A step with all its inputs and outputs side by side."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.names = list(step.start())

    def forward(self, samples: Tensor, films: Tensor, keys: Tensor, values: Tensor, *state: Tensor) -> tuple[Any, ...]:
        """Return the estimate and the next state."""
        given = dict(zip(self.names, state, strict=True))
        estimate, after = self.step(samples, VoiceTensors(films, keys, values), given)
        return estimate, *(after[name] for name in self.names)


def export(extractor: Extractor, folder: Path) -> list[Path]:
    """Write the graphs of an extractor's network to a folder and return their files.

    Raises `MissingDependencyError` without onnx and onnxruntime, and for SpEx+ onnxscript, and `StorageError`.
    """
    onnx = _require_packages("onnxruntime", "onnx")
    is_traced = isinstance(extractor.model, BandSplitExtractor)
    if not is_traced:
        _require_packages("onnxscript")
    facts, written = _facts(extractor), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph, inputs, outputs in _graphs(copy.deepcopy(extractor.model).cpu().float().eval()):
        path = folder / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about lengths that become constants; `_compare` looks for those
            data = (_trace if is_traced else _translate)(graph, inputs, outputs)
        proto = onnx.load_model_from_string(data)
        proto.metadata_props.add(key="onevoice", value=json.dumps({"graph": name, **facts}))
        atomic_write(path, proto.SerializeToString())
        written.append(path)
        _compare(path, graph, {key: _longer(key, value) for key, value in inputs.items()})
    return written


def _require_packages(*names: str) -> Any:
    """Return the last of some packages."""
    for package in names:
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(f'export: needs {package}: pip install "onevoice[onnx]"') from error
    return module


@torch.no_grad()
def _graphs(model: Any) -> list[tuple[str, nn.Module, dict[str, Tensor], list[str]]]:
    """Return the name of each graph, its module, inputs to trace it with, and its outputs."""
    multiple, rate = multiple_of(model), model.config.sample_rate
    sound = 0.1 * torch.randn(1, rate // multiple * multiple, generator=torch.Generator().manual_seed(0))
    enroll = EnrollGraph(model)
    embedding: Tensor = enroll(sound)
    graphs: list[tuple[str, nn.Module, dict[str, Tensor], list[str]]] = [
        ("enroll", enroll, {"ref": sound}, ["embedding"]),
        ("extract", ExtractGraph(model), {"audio": sound, "embedding": embedding}, ["estimate"]),
    ]
    if isinstance(model, BandSplitExtractor) and model.config.causal:
        step = Step(model)
        state, voice = step.start(), step.prepare(embedding)._asdict()
        graphs.append(("voice", VoiceGraph(model), {"embedding": embedding}, list(voice)))
        outputs = ["estimate", *(f"next_{name}" for name in state)]
        graphs.append(("step", StepGraph(step), {"samples": sound[:, : step.hop], **voice, **state}, outputs))
    return graphs


def _trace(graph: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> bytes:
    """Return an ONNX graph whose sounds may have any length."""
    file = io.BytesIO()
    free = [*_free(inputs), *(["estimate"] if "audio" in inputs else [])]
    arguments: Any = tuple(value.detach() for value in inputs.values())
    with torch.enable_grad():  # without gradients, layers take paths that cannot be traced
        torch.onnx.export(
            graph, arguments, file, input_names=list(inputs), output_names=outputs,
            dynamic_axes={name: {1: "length"} for name in free}, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return file.getvalue()


def _translate(graph: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> bytes:
    """Return the same from torch's other exporter."""
    arguments = tuple(value.detach() for value in inputs.values())
    shapes = tuple({1: torch.export.Dim.DYNAMIC} if name in _free(inputs) else None for name in inputs)
    with torch.enable_grad():
        program = torch.export.export(
            graph, arguments, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        translated = torch.onnx.export(
            program, (), input_names=list(inputs), output_names=outputs, dynamo=True, verbose=False
        )
    assert translated is not None
    return bytes(translated.model_proto.SerializeToString())


def _free(inputs: dict[str, Tensor]) -> set[str]:
    """Return the names of the inputs of any length."""
    return inputs.keys() & {"ref", "audio"}


def _longer(name: str, value: Tensor) -> Tensor:
    """Return a sound three times as long; other inputs stay."""
    return value.repeat(1, 3) if _free({name: value}) else value


@torch.no_grad()
def _compare(path: Path, graph: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Check that a file gives what its module gives."""
    wanted = graph(*inputs.values())
    found = open_session(path, 1).run(None, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(found, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        difference = (torch.from_numpy(ours) - theirs).abs().max()
        if ours.shape != theirs.shape or difference > MAX_DIFFERENCE * max(1.0, float(theirs.abs().max())):
            raise AssertionError(f"{path}: differs from the network by {difference:g}, a bug in onevoice")


def _facts(extractor: Extractor) -> dict[str, Any]:
    config = extractor.card.config
    return {
        "card": json.loads(extractor.card.to_json()),
        "model_hash": extractor.model_hash,
        "sample_rate": config.sample_rate,
        "multiple_of": multiple_of(extractor.model),
        "normalize_level": config.normalize_level,
        "context_seconds": config.context_seconds,
        "latency_seconds": getattr(config, "latency_seconds", None),
        "hop": config.hop,
        "max_gain": None if extractor.max_gain == float("inf") else extractor.max_gain,
    }
