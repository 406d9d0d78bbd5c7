"""Checkpoints come back bit for bit with their card, never run code, and give clear errors."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny import SMALL_CONFIGS, SPEAKERS, TINY, save_tiny

from onevoice.config import to_dict
from onevoice.errors import CheckpointError, StorageError
from onevoice.extraction.checkpoint import (
    CARD_KEY,
    FORMAT,
    Card,
    load_checkpoint,
    load_model,
    load_state,
    load_weights,
    provenance,
    save_checkpoint,
)
from onevoice.extraction.pickled import load_pickled, resume_path, save_resume
from onevoice.models import MODELS, Network, SpExPlus


@pytest.fixture
def model() -> Network:
    torch.manual_seed(1)
    return SpExPlus(TINY).eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def with_card(**changes: Any) -> bytes:
    card = {**json.loads(Card(TINY, SPEAKERS, {"step": 3}).to_json()), **changes}
    return save(SpExPlus(TINY).state_dict(), metadata={CARD_KEY: json.dumps(card)})


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_is_restored_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = SMALL_CONFIGS[name]
    network = MODELS[name]
    assert isinstance(config, network.config_class)
    model = network(config).eval()
    card = Card(config, ("b", "a ü"), {"step": 7, "score": 1.5, "none": None})
    save_checkpoint(tmp_path / "a.safetensors", model.state_dict(), card)
    loaded, loaded_card = load_model(tmp_path / "a.safetensors")
    assert isinstance(loaded, network)
    assert not loaded.training
    assert loaded_card == card
    assert same(loaded.state_dict(), model.state_dict())
    batch = {"audio": torch.randn(2, 800), "ref": torch.randn(2, 1600)}
    with torch.inference_mode():
        for a, b in zip(loaded(batch)["predicted_audio"], model(batch)["predicted_audio"], strict=True):
            assert torch.equal(a, b)


def test_the_card_is_readable_by_anyone(tmp_path: Path) -> None:
    """The header of a safetensors file is eight bytes of length, then JSON."""
    data = save_tiny(tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card = json.loads(header["__metadata__"][CARD_KEY])
    assert card == {
        "format": FORMAT,
        "model": "spexplus",
        "sample_rate": 8000,
        "config": to_dict(TINY),
        "speakers": list(SPEAKERS),
        "facts": {"step": 3},
    }


def test_shared_and_strided_weights_are_written(tmp_path: Path, model: Network) -> None:
    state = {
        name: value.to(torch.float64).t() if value.ndim == 2 else value for name, value in model.state_dict().items()
    }
    save_checkpoint(tmp_path / "a.safetensors", state, Card(TINY))
    assert same(load_checkpoint(tmp_path / "a.safetensors")[0], state)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, model: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: save_checkpoint(path, model.state_dict(), Card(TINY)),
        lambda: save_resume(path, {"model": model.state_dict()}),
    ):
        with pytest.raises(StorageError, match=r"a\.safetensors: cannot be written \(No space left on device\)"):
            write()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "newer": (lambda: with_card(format=FORMAT + 1), rf"has format {FORMAT + 1}, newer than this onevoice knows"),
    "format of text": (lambda: with_card(format="1"), "its card is damaged"),
    "other model": (lambda: with_card(model="wesep"), "holds a 'wesep'; this onevoice knows spexplus"),
    "model is a list": (lambda: with_card(model=[]), "its card is damaged"),
    "unknown key": (lambda: with_card(config={**to_dict(TINY), "dropout": 1}), "dropout: unknown key"),
    "other sizes": (lambda: with_card(config={**to_dict(TINY), "hidden": 12}), "belongs to another model .* not \\("),
    "no config": (lambda: with_card(config=None), "its card is damaged"),
    "config of nothing": (lambda: with_card(config={"name": 3}), "its card does not fit .*name: input should be"),
    "facts are a number": (lambda: with_card(facts=3), "its card is damaged"),
    "broken card": (lambda: save({"a": torch.zeros(1)}, metadata={CARD_KEY: "{"}), "its card is damaged"),
    "card is a list": (lambda: save({"a": torch.zeros(1)}, metadata={CARD_KEY: "[1]"}), "its card is damaged"),
    "foreign": (lambda: save({"a": torch.zeros(1)}), "has no onevoice card, so another program wrote it"),
    "text": (lambda: b"Hello, this is text.\n", "not a readable checkpoint"),
    "empty": (lambda: b"", "not a readable checkpoint"),
    "header cut": (lambda: with_card()[:100], "not a readable checkpoint"),
    "weights cut": (lambda: with_card()[:-100], "not a readable checkpoint"),
}


@pytest.mark.parametrize(("make", "complaint"), DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_and_foreign_files(tmp_path: Path, make: Callable[[], bytes], complaint: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"^\S*a\.safetensors: .*{complaint}") as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / "none.pth"):
        with pytest.raises(CheckpointError, match="no such checkpoint file"):
            load_weights(path)


def test_errors_name_the_weights_that_do_not_fit(tmp_path: Path, model: Network) -> None:
    state = model.state_dict()
    missing = {name: value for name, value in state.items() if name != "classifier.bias"}
    with pytest.raises(CheckpointError, match=r"^x: .*: classifier\.bias is missing$"):
        load_state(model, missing, "x")
    with pytest.raises(CheckpointError, match=r"extra is unknown to the model$"):
        load_state(model, {**state, "extra": torch.zeros(1)}, "x")
    with pytest.raises(CheckpointError, match=r"classifier\.bias is \(9,\), not \(4,\)$"):
        load_state(model, {**state, "classifier.bias": torch.zeros(9)}, "x")
    with pytest.raises(CheckpointError, match=rf"; and {len(state) - 3} more$"):
        load_state(model, {}, "x")
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(CheckpointError):
        load_state(model, {name: value + 1 for name, value in missing.items()}, "x")
    assert same(model.state_dict(), before)  # nothing was loaded


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pth_of_the_original_system(tmp_path: Path, model: Network, prefix: str) -> None:
    state = model.state_dict()
    path = tmp_path / "model_best.pth"
    torch.save({"arch": "SpExPlus", "state_dict": {prefix + name: value for name, value in state.items()}}, path)
    loaded, card = load_model(path, TINY)
    assert same(loaded.state_dict(), state)
    assert card == Card(TINY)
    with pytest.raises(CheckpointError, match=r"model_best\.pth: does not say which model it is"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"model_best\.pth: belongs to another model"):
        load_model(path, dataclasses.replace(TINY, hidden=12))


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [{"weights": {}}, {"state_dict": 3}, {"state_dict": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}}],
)
def test_pth_without_weights(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "a.pth").write_bytes(pickled(content))
    with pytest.raises(CheckpointError, match=r"a\.pth: has no 'state_dict' of tensors"):
        load_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "data", [b"", b"Hello", b"\x80\x02}q\x00.", pickled([1]), pickled({})[:200], pickled({"a": torch.zeros(9)})[:-60]]
)
def test_pth_that_is_broken(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth: (not a readable checkpoint|holds a list)") as error:
        load_weights(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


class Calling:
    """An object that calls `function` when plain pickle unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "in the weights", "beside the weights"])
@pytest.mark.parametrize("function", ["system", "eval", "open"])
def test_code_in_a_pth_is_never_run(tmp_path: Path, model: Network, function: str, place: str, zipped: bool) -> None:
    trace = tmp_path / "trace"
    code = {
        "system": Calling(os.system, f"touch {trace}"),
        "eval": Calling(eval, f"__import__('pathlib').Path({str(trace)!r}).touch()"),
        "open": Calling(open, str(trace), "w"),
    }[function]
    content = {
        "alone": code,
        "in the weights": {"state_dict": {"a": code}},
        "beside the weights": {"state_dict": model.state_dict(), "config": code},
    }[place]
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for read in (lambda: load_model(path, TINY), lambda: load_pickled(path)):
        with contextlib.suppress(CheckpointError):  # code beside the weights is skipped
            read()
        assert not trace.exists()
    pickle.loads(pickle.dumps(code))  # plain pickle would have run it
    assert trace.exists()


def test_resume_files(tmp_path: Path) -> None:
    content = {"step": 3, "text": "ü", "list": [1, 2.5, None], "tensor": torch.arange(3), "nested": {"a": (1, "b")}}
    save_resume(tmp_path / "last.resume.pt", content)
    back = load_pickled(tmp_path / "last.resume.pt")
    assert torch.equal(back.pop("tensor"), content.pop("tensor"))  # type: ignore[call-overload]
    assert back == content
    assert resume_path(tmp_path / "last.safetensors") == resume_path(tmp_path / "last.resume.pt")
    assert resume_path("a/v1.2.safetensors") == Path("a/v1.2.resume.pt")


def test_provenance_names_versions_and_commit() -> None:
    facts = provenance()
    assert facts["onevoice"] == version("onevoice")
    assert facts["torch"] == torch.__version__
    if (Path(__file__).parents[2] / ".git").exists():
        assert facts["commit"]


def test_small_configs_cover_every_network() -> None:
    assert SMALL_CONFIGS.keys() == MODELS.keys()


@pytest.mark.parametrize("levelled", [True, False, None])
def test_the_level_fact_of_older_cards_becomes_a_field(tmp_path: Path, levelled: bool | None) -> None:
    config = to_dict(TINY)
    del config["has_level"]
    facts = {} if levelled is None else {"levelled": levelled}
    (tmp_path / "old.safetensors").write_bytes(with_card(config=config, facts=facts))
    assert load_model(tmp_path / "old.safetensors")[1].config == dataclasses.replace(TINY, has_level=bool(levelled))
    card = Card(dataclasses.replace(TINY, has_level=True), SPEAKERS, facts)
    save_checkpoint(tmp_path / "new.safetensors", SpExPlus(TINY).state_dict(), card)
    assert load_model(tmp_path / "new.safetensors")[1] == card
