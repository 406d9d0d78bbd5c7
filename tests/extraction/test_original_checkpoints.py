"""Checkpoints of the original system load exactly, and what is not one is refused in one line."""

import copy
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original import ORIGINAL, ConfigParser, original_checkpoint, random_network, their_name
from tiny import ROOT, command
from toy_runs import forked_process

import onevoice
from onevoice.errors import CheckpointError
from onevoice.extraction.checkpoint import load_checkpoint, load_model, load_original, load_weights, read_registry
from onevoice.extraction.original import convert_moments
from onevoice.models import SpExPlus

DEFAULT = read_registry().default


@pytest.fixture
def content() -> dict[str, Any]:
    return original_checkpoint(random_network())


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_config_and_estimates_are_those_of_the_file(tmp_path: Path, prefix: str) -> None:
    model = random_network().double()
    content = original_checkpoint(model)
    content["state_dict"] = {prefix + name: values for name, values in content["state_dict"].items()}
    state, card = load_weights(save(tmp_path / "a.pth", content))
    assert card is not None
    assert card.config == ORIGINAL
    assert (card.speakers, card.facts["arch"], card.facts["epoch"]) == ((), "SpexPlus", 1)
    own = model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)
    loaded = SpExPlus(card.config).double().eval()
    loaded.load_state_dict(state)
    batch = {"audio": torch.randn(1, 3333).double(), "ref": torch.randn(1, 4444).double()}
    with torch.no_grad():
        for ours, theirs in zip(loaded(batch)["predicted_audio"], model(batch)["predicted_audio"], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (ConfigParser({"preprocessing": {"sr": 8000}}), 8000),
        ({"preprocessing": {"sr": 8000}}, 8000),
        (ConfigParser({}), 16_000),
        ({"preprocessing": 8000}, 16_000),
        ({"_config": 8000}, 16_000),
        ({"preprocessing": {"sr": -1}}, 16_000),
        (None, 16_000),
    ],
)
def test_the_rate_is_that_of_the_config_in_the_file(
    tmp_path: Path, content: dict[str, Any], config: Any, rate: int
) -> None:
    _, card = load_model(save(tmp_path / "a.pth", {**content, "config": config}))
    assert (card.config.sample_rate, card.config.windows) == (rate, ORIGINAL.windows)  # type: ignore[attr-defined]


def test_moments_go_to_the_parameters_they_belong_to(tmp_path: Path, content: dict[str, Any]) -> None:
    """The order of the names in the file, whatever it is, numbers the parameters."""
    content["state_dict"] = dict(reversed(content["state_dict"].items()))
    parameters = [name for name, _ in random_network().named_parameters()]
    order = [name for name in content["state_dict"] if name in map(their_name, parameters)]
    for number, name in enumerate(order):
        content["optimizer"]["state"][number] = {
            "step": 7,
            "exp_avg": torch.full_like(content["state_dict"][name], number),
            "exp_avg_sq": torch.full_like(content["state_dict"][name], number**2),
        }
    moments = convert_moments(load_original(save(tmp_path / "a.pth", content)))
    assert sorted(moments) == sorted(parameters)
    for name, values in random_network().named_parameters():
        number = float(order.index(their_name(name)))
        assert float(moments[name]["step"]) == 7
        assert torch.equal(moments[name]["exp_avg"], torch.full_like(values, number))
        assert torch.equal(moments[name]["exp_avg_sq"], torch.full_like(values, number**2))


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.clear(),
        lambda saved: saved["state"].pop(3),
        lambda saved: saved["state"][3].pop("exp_avg_sq"),
        lambda saved: saved["state"][3].update(exp_avg=torch.zeros(1, 2, 3)),
        lambda saved: saved["param_groups"].append({"params": []}),
        lambda saved: saved["param_groups"][0].update(params=[0]),
        lambda saved: saved["param_groups"][0].update(amsgrad=True),
    ],
)
def test_other_optimizers_are_refused(
    tmp_path: Path, content: dict[str, Any], change: Callable[[dict[str, Any]], Any]
) -> None:
    change(content["optimizer"])
    original = load_original(save(tmp_path / "a.pth", content))
    with pytest.raises(CheckpointError, match="does not hold the moments of Adam for every parameter"):
        convert_moments(original)


def rename(content: dict[str, Any], old: str, new: str) -> None:
    content["state_dict"] = {name.replace(old, new): values for name, values in content["state_dict"].items()}


def halve(content: dict[str, Any]) -> None:
    names = list(content["state_dict"])
    content["state_dict"] = {name: content["state_dict"][name] for name in names[: len(names) // 2]}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "half": (halve, r"a\.pth: not a whole checkpoint of the original system: .* and \d+ more; copy it again"),
    "one is missing": (
        lambda content: content["state_dict"].pop("speaker_extractor.head2.0.weight"),
        r"a\.pth: not a whole checkpoint of the original system: speaker_extractor\.head2\.0\.weight is missing; copy",
    ),
    "bias is missing": (
        lambda content: content["state_dict"].pop("speaker_extractor.head2.0.bias"),
        r"a\.pth: belongs to another model .*: masks\.1\.bias is missing$",
    ),
    "one too many": (
        lambda content: content["state_dict"].update(extra=torch.zeros(1)),
        r"a\.pth: not a whole checkpoint of the original system: extra does not belong to it; copy it again",
    ),
    "no temporal blocks": (
        lambda content: rename(content, "speaker_extractor.tcn.", "speaker_extractor.lstm."),
        r"a\.pth: not a whole checkpoint of the original system: .* and \d+ more; copy it again",
    ),
    "billions of blocks": (
        lambda content: rename(content, "tcn.1.", "tcn.4000000000."),
        r"a\.pth: not a whole checkpoint of the original system: most of its temporal blocks are missing; copy",
    ),
    "another width": (
        lambda content: content["state_dict"].update({"speaker_encoder.layers.5.weight": torch.zeros(9, 16, 1)}),
        r"a\.pth: belongs to another model than spexplus",
    ),
    "a scalar": (
        lambda content: content["state_dict"].update({"classificator.layers.0.weight": torch.zeros(())}),
        r"a\.pth: the sizes of its weights fit no SpEx\+",
    ),
    "another architecture": (
        lambda content: content.update(state_dict={"net.0.weight": torch.zeros(2, 2)}),
        r"a\.pth: does not say which model it is, and is no SpexPlus of the original system \(it holds net\.0\.weight",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_original_checkpoint(
    tmp_path: Path, content: dict[str, Any], change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    change(content)
    with pytest.raises(CheckpointError, match=complaint) as error:
        load_model(save(tmp_path / "a.pth", content))
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["config", "optimizer"])
@pytest.mark.parametrize("verb", ["info", "convert", "load", "resume"])
def test_a_checkpoint_with_code_is_refused_and_the_code_is_not_run(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str], verb: str, place: str
) -> None:
    trace = tmp_path / "trace"
    path = save(tmp_path / "a.pth", {**content, place: Malicious(trace)})
    complaint = f"{path}: not a readable checkpoint: a pickle that contains code, none of which was run"
    if verb in ("load", "resume"):
        with pytest.raises(CheckpointError, match=re.escape(complaint)):
            (onevoice.load if verb == "load" else load_original)(path)
    else:
        result = command(capsys, verb, path, *([tmp_path / "a.safetensors"] if verb == "convert" else []))
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(f"onevoice: error: {complaint}")
    assert not trace.exists()
    assert not (tmp_path / "a.safetensors").exists()


def test_info_and_convert(tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "model_best.pth", content)
    shown = command(capsys, "info", path)
    assert (shown.status, shown.err) == (0, "")
    assert '"norm_eps": 1e-07' in shown.out
    output = tmp_path / "out.safetensors"
    assert command(capsys, "convert", path, output).out == f"{output}\n"
    state, card = load_checkpoint(output)
    assert (card.config, card.facts["converted_from"]) == (ORIGINAL, "model_best.pth")
    own = random_network().state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.pth"], "OUTPUT: is missing"),
        (["a.pth", "b.pth"], "b.pth: must be another file than a.pth, and end in .safetensors"),
        (["a.pth", "b.json"], "b.json: must be another file than a.pth, and end in .safetensors"),
        (["a.pth", "none/../a.safetensors"], f"a.pth: no such checkpoint file; give your own or {DEFAULT}"),
        (["a.json", "a.json"], "a.json: must be another file than a.json"),
        (["a.json"], "a.json: cannot be read"),
    ],
)
def test_convert_says_what_to_give(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(capsys, "convert", *arguments)
    assert result.status == 2
    assert result.err.startswith(f"onevoice: error: {complaint}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "a WAV recording"),
        (b"fLaC\x00\x00\x00\x22", "a FLAC recording"),
        (b'{"arch": {}}', "JSON"),
        (b"Some text\nof two lines.\n", "text"),
        (b"<!DOCTYPE html>", "an HTML or XML page"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["file", "a.pth", "a.safetensors"])
def test_info_says_what_another_file_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, kind: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    result = command(capsys, "info", path)
    assert result.status == 2
    assert result.err.startswith(f"onevoice: error: {path}: not a readable checkpoint: it is {kind}")
    assert result.err.count("\n") == 1


def test_info_of_weights_without_a_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.pth", {"state_dict": {"net.0.weight": torch.zeros(2)}})
    result = command(capsys, "info", path)
    assert result.status == 2
    assert f"{path}: holds 1 tensors, but does not say which model they belong to" in result.err


@pytest.mark.parametrize("lengths", [(800, 1620), (815, 1635), (999, 2600), (40, 1640)])
@torch.no_grad()
def test_padding_changes_nothing_in_whole_frames(lengths: tuple[int, int]) -> None:
    model = copy.deepcopy(random_network()).double()
    audio, ref = torch.randn(1, lengths[0]).double(), torch.randn(1, lengths[1]).double()
    alone = model({"audio": audio, "ref": ref})
    padded = model(
        {
            "audio": torch.nn.functional.pad(audio.expand(2, -1), (0, 77), value=3.0),
            "ref": torch.nn.functional.pad(ref.expand(2, -1), (0, 1111), value=3.0),
            "audio_length": torch.tensor([lengths[0], lengths[0] + 77]),
            "ref_length": torch.tensor([lengths[1], lengths[1] + 1111]),
        }
    )
    torch.testing.assert_close(padded["predicted_logits"][:1], alone["predicted_logits"])
    for one, many in zip(alone["predicted_audio"], padded["predicted_audio"], strict=True):
        torch.testing.assert_close(many[:1, : lengths[0]], one)
        assert not many[0, lengths[0] :].any()


@torch.no_grad()
def test_whole_frames_end_with_the_last_whole_frame() -> None:
    """Beyond it the short decoder is silent, and by default it is not."""
    model, ref = random_network(), torch.randn(1, 1700)
    audio = torch.randn(1, 40 + 20 * 10 + 13)
    assert not model({"audio": audio, "ref": ref})["predicted_audio"][0][0, 240:].any()
    default = SpExPlus(replace(ORIGINAL, whole_frames=False)).eval()
    default.load_state_dict(model.state_dict())
    assert default({"audio": audio, "ref": ref})["predicted_audio"][0][0, 240:].all()


def test_the_download_script_names_the_weights_to_use() -> None:
    result = forked_process([ROOT / "download_checkpoint.py"])
    assert (result.status, result.err) == (0, "")
    assert f"nothing to download: the weights {DEFAULT} come with onevoice" in result.out
    assert "as checkpoints/final_run/checkpoint.pth" in result.out
