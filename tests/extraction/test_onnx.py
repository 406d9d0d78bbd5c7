"""Exported graphs: run without PyTorch, they give what the network gives, whole and in steps."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from extraction.test_stream import CAUSAL, HOP, noise, push_all
from tiny import SMALL_CONFIGS, process

from onevoice.errors import AudioError, CheckpointError, ConfigError, MissingDependencyError
from onevoice.extraction import onnx
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.export import export
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.voice import save_voice
from onevoice.models import build

CONFIG = replace(CAUSAL, blocks=2, has_level=True)
RATE = CONFIG.sample_rate


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor(build(CONFIG), Card(CONFIG, ("anna",), {"step": 3}))


def export_unchecked(extractor: Extractor, folder: Path) -> set[str]:
    """Traced lengths are tensors, which the checks of shapes refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return {path.stem for path in export(extractor, folder)}


@pytest.fixture(scope="module")
def folder(extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    assert export_unchecked(extractor, folder) == {"enroll", "extract", "voice", "step"}
    return folder


WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Block())
import numpy as np, onevoice
folder, path = sys.argv[1:]
given = np.load(path + ".npz")
extractor = onevoice.onnx.load(folder)
voice = extractor.enroll(given["enrollment"], 8000)
stream = extractor.stream(extractor.load_voice(path + ".voice"), 8000)
streamed = [stream.push(given["mixture"][first : first + 100]) for first in range(0, len(given["mixture"]), 100)]
np.savez(path + ".out.npz", embedding=voice.embedding, extracted=extractor.extract(given["mixture"], 8000, voice),
         streamed=np.concatenate([*streamed, stream.flush()]))
assert "torch" not in sys.modules
"""


def test_without_torch_all_graphs_give_what_the_network_gives(
    extractor: Extractor, folder: Path, tmp_path: Path
) -> None:
    enrollment, mixture, path = noise(9001, 1), noise(7003), tmp_path / "given"
    voice = extractor.embed([enrollment])
    np.savez(f"{path}.npz", enrollment=enrollment, mixture=mixture)
    save_voice(voice, f"{path}.voice")
    outcome = process(["-c", WITHOUT_TORCH, folder, path])
    assert outcome.status == 0, outcome.err
    got = np.load(f"{path}.out.npz")
    assert np.abs(got["embedding"] - voice.embedding.numpy()).max() < 1e-4
    assert np.abs(got["extracted"] - extractor.extract(mixture, RATE, voice)).max() < 1e-4 * np.abs(mixture).max()
    wanted = push_all(extractor.stream(voice, RATE), mixture, [1000])
    assert np.abs(got["streamed"] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_long_recordings_in_windows(extractor: Extractor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "CORE_SECONDS", 0.3)
    exported, mixture = onnx.load(folder), noise(2 * RATE)
    voice = exported.enroll(noise(9001, 1), RATE)
    ours = exported.extract(mixture, RATE, voice)
    theirs = extractor.extract(mixture, RATE, extractor.embed([noise(9001, 1)]))
    assert np.abs(ours - theirs).max() < 1e-5
    assert len(exported.extract(mixture.astype(np.float64)[None], 11_025, voice)) == len(mixture)


def test_a_state_goes_from_torch_to_onnx(extractor: Extractor, folder: Path) -> None:
    voice, exported = extractor.embed([noise(9001, 1)]), onnx.load(folder)
    stream = extractor.stream(voice, RATE)
    stream.push(noise(5 * HOP + 3))
    other = exported.stream(onnx.OnnxVoice(voice.embedding.numpy(), voice.model_hash), RATE)
    other.state = stream.state
    rest = noise(9 * HOP, 2)
    assert np.abs(push_all(stream, rest, [99]) - push_all(other, rest, [77])).max() < 1e-5


def test_networks_that_need_the_whole(tmp_path: Path) -> None:
    """The export compares each graph with its network at another length; here, the arithmetic around them too."""
    torch.manual_seed(0)
    extractor = Extractor(build(SMALL_CONFIGS["bandsplit"]), Card(SMALL_CONFIGS["bandsplit"]))
    assert export_unchecked(extractor, tmp_path) == {"enroll", "extract"}
    exported, mixture, enrollment = onnx.load(tmp_path), 3 + noise(7003), noise(9001, 1)
    voice = exported.enroll(enrollment, RATE)
    wanted = extractor.embed([enrollment])
    assert np.abs(voice.embedding - wanted.embedding.numpy()).max() < 1e-4 * wanted.embedding.abs().max()
    assert np.abs(exported.extract(mixture, RATE, voice) - extractor.extract(mixture, RATE, wanted)).max() < 1e-4
    with pytest.raises(ConfigError, match="a stream needs a causal network"):
        exported.stream(voice, RATE)


def test_spexplus_goes_through_the_other_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That exporter takes a minute, so it only is asked for here; each export compares its graphs by itself."""
    extractor = Extractor(build(SMALL_CONFIGS["spexplus"]), Card(SMALL_CONFIGS["spexplus"]))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match="export: needs onnxscript"):
        export(extractor, tmp_path)


def test_metadata(extractor: Extractor, folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        session = onnx.open_session(path, 1)
        facts = json.loads(session.get_modelmeta().custom_metadata_map["onevoice"])
        assert facts["graph"] == path.stem
        assert facts["card"] == json.loads(extractor.card.to_json())
        assert facts["latency_seconds"] == CONFIG.latency_seconds
    step = onnx.open_session(folder / "step.onnx", 1)
    state = [each.name for each in step.get_inputs()][4:]
    assert [each.name for each in step.get_outputs()] == ["estimate", *(f"next_{name}" for name in state)]
    assert onnx.load(folder).card["speakers"] == ["anna"]


def test_what_is_refused(extractor: Extractor, folder: Path, tmp_path: Path) -> None:
    exported = onnx.load(folder)
    with pytest.raises(CheckpointError, match="is missing; write it with onevoice export"):
        onnx.load(tmp_path)
    (tmp_path / "enroll.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="cannot be read"):
        onnx.load(tmp_path)
    (tmp_path / "a.voice").write_bytes(b"no voice at all")
    with pytest.raises(CheckpointError, match="is not a readable voice"):
        exported.load_voice(tmp_path / "a.voice")
    with pytest.raises(CheckpointError, match="other weights"):
        exported.extract(noise(4000), RATE, onnx.OnnxVoice(np.zeros((1, 224), np.float32), "other"))
    with pytest.raises(AudioError, match=r"lasts 0\.01 s"):
        exported.enroll(noise(100), RATE)
    with pytest.raises(AudioError, match="give a float array"):
        exported.enroll(np.zeros(9000, np.int16), RATE)
