"""Configs: values that fit are kept exactly, and a value that does not fit is named by its full path."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT, from_dict, json_schema, load_config, override, require_rising, to_dict
from onevoice.errors import ConfigError
from onevoice.evaluation.run import EvaluationConfig
from onevoice.models import SpExPlusConfig
from onevoice.training.experiment import ConstantConfig, Experiment, OneCycleConfig, PlateauConfig
from onevoice.training.tracking import WandbConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
MINIMAL: dict[str, Any] = {"name": "x", "data": {"train": {"folder": "a"}, "validation": {"folder": "b"}}}


def kind_of(path: Path) -> type[Any]:
    return EvaluationConfig if path.name == "test_config.json" else Experiment


def test_a_minimal_config_has_every_default() -> None:
    experiment = from_dict(Experiment, MINIMAL)
    assert experiment == Experiment(name="x", data=experiment.data)
    assert experiment.model == SpExPlusConfig()
    assert (experiment.loss.alpha, experiment.loss.beta, experiment.loss.lambd) == (0.1, 0.1, 0.5)  # the paper's
    assert from_dict(EvaluationConfig, {}) == EvaluationConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(kind_of(path), path)
    assert from_dict(kind_of(path), to_dict(config)) == config
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(path.read_text()), json_schema(kind_of(path)))


def test_no_shipped_config_is_missing() -> None:
    assert {"final_run_config.json", "test_config.json"} <= {path.name for path in CONFIGS}


def test_the_original_experiment() -> None:
    experiment = load_config(Experiment, CONFIGS[0].parent / "final_run_config.json")
    assert experiment.model == SpExPlusConfig(
        sample_rate=16_000, num_classes=500, normalize_level=False, norm_eps=1e-7, whole_frames=True
    )
    assert (experiment.optimizer.name, experiment.optimizer.learning_rate) == ("adam", 1e-3)
    assert experiment.scheduler == OneCycleConfig(max_learning_rate=1e-3, rising_part=0.2)
    assert experiment.data.batch_size == 5
    assert (experiment.training.epochs, experiment.training.early_stop_epochs) == (21, 100)
    assert experiment.training.clip_gradient_norm is None
    assert experiment.tracking.wandb == WandbConfig(project="ss_project", mode="online")


@pytest.mark.parametrize("kind", [Experiment, EvaluationConfig])
def test_the_schema_is_valid_and_forbids_unknown_keys(kind: type[Any]) -> None:
    schema = json.loads(json.dumps(json_schema(kind)))
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections if section.get("type") == "object")
    if kind is Experiment:
        assert schema["required"] == ["name", "data"]
        assert schema["$defs"]["TrainingConfig"]["properties"]["epochs"]["exclusiveMinimum"] == 0
        assert schema["$defs"]["OneCycleConfig"]["properties"]["rising_part"]["default"] == 0.3
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validators.validator_for(schema).check_schema(schema)


SIZES = st.integers(1, 10**6)
SPEXPLUS = st.fixed_dictionaries(
    {},
    optional={
        "sample_rate": st.sampled_from([8000, 16_000, 44_100]),
        "num_classes": st.integers(0, 10**6),
        "normalize_level": st.booleans(),
        "window_seconds": st.sampled_from([(0.0025, 0.01, 0.02), (0.02, 0.02, 1 / 3), (0.02, 0.1 + 0.2, 1e3)]),
        "kernel_size": SIZES.map(lambda size: 2 * size - 1),
        **dict.fromkeys(("filters", "channels", "hidden", "blocks", "stacks", "speaker_dim"), SIZES),
    },
)


@given(SPEXPLUS)
def test_a_config_survives_json(values: dict[str, Any]) -> None:
    config = SpExPlusConfig(**values)
    text = json.dumps(to_dict(config))
    assert from_dict(SpExPlusConfig, json.loads(text)) == config


@given(st.floats(0, 1e300, exclude_min=True), st.text(), st.integers())
def test_an_experiment_survives_json(rate: float, name: str, seed: int) -> None:
    values = override({**MINIMAL, "name": name}, [f"optimizer.learning_rate={rate!r}", f"seed={seed}"])
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    experiment = from_dict(Experiment, values)
    assert (experiment.optimizer.learning_rate, experiment.name, experiment.seed) == (rate, name, seed)
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"name": "onecycle", "max_learning_rate": 0.5}, OneCycleConfig(max_learning_rate=0.5)),
        ({"name": "plateau", "patience_epochs": 7}, PlateauConfig(patience_epochs=7)),
        ({"name": "constant"}, ConstantConfig()),
    ],
)
def test_the_name_selects_the_scheduler(values: dict[str, Any], kind: object) -> None:
    assert from_dict(Experiment, {**MINIMAL, "scheduler": values}).scheduler == kind


WRONG = {
    "trainin.epochs=2": "trainin: unknown key; did you mean 'training'?",
    "training.epoch=2": "training.epoch: unknown key; did you mean 'epochs'?",
    "data.validation.foldr=a": "data.validation.foldr: unknown key; did you mean 'folder'?",
    "model.num_clases=0": "model.num_clases: unknown key; did you mean 'num_classes'?",
    'scheduler={"name":"onecycle","max_lr":1}': "scheduler.max_lr: unknown key; did you mean 'max_learning_rate'?",
    'scheduler={"name":"plateau","patience":1}': "scheduler.patience: unknown key; did you mean 'patience_epochs'?",
    'scheduler={"name":"constant","qq":1}': "scheduler.qq: unknown key; known keys: name",
    'scheduler={"name":"onecycle","max_learning_rate":-1}': (
        "scheduler.max_learning_rate: input should be greater than 0, not -1"
    ),
    "scheduler.name=cosine": (
        "scheduler.name: input should be one of 'onecycle', 'plateau', 'constant', 'wsd', not \"cosine\""
    ),
    "scheduler.max_learning_rate=1": "scheduler.name: is required and missing",
    "scheduler=3": "scheduler: input should be an object, not 3",
    "optimizer.learning_rate=-1": "optimizer.learning_rate: input should be greater than 0, not -1",
    "optimizer.learning_rate=NaN": "optimizer.learning_rate: input should be a finite number, not NaN",
    "optimizer.learning_rate=Infinity": "optimizer.learning_rate: input should be a finite number, not Infinity",
    'optimizer.learning_rate="1"': 'optimizer.learning_rate: input should be a valid number, not "1"',
    "optimizer.betas=[0.9,2.0]": "optimizer.betas.1: input should be less than 1, not 2.0",
    "training.epochs=true": "training.epochs: input should be a valid integer, not true",
    "training.epochs=1.5": "training.epochs: input should be a valid integer, not 1.5",
    "training.epochs=null": "training.epochs: input should be a valid integer, not null",
    "training.device=tpu": "training.device: input should be 'auto', 'cpu', 'cuda' or 'mps', not \"tpu\"",
    "name=3": "name: input should be a valid string, not 3",
    "data.validation=null": "data.validation: input should be an object, not null",
    "data={}": "data.train: is required and missing; data.validation: is required and missing",
    "model.kernel_size=2": "model: kernel_size must be odd, not 2",
    "model.window_seconds=[0.002,0.01,1e308]": "a number is too large (cannot convert float infinity to integer)",
    "model.name=wesep": "model.name: input should be one of 'spexplus', 'bandsplit', not \"wesep\"",
}


@pytest.mark.parametrize(("setting", "message"), WRONG.items(), ids=list(WRONG))
def test_a_value_that_does_not_fit_is_named_by_its_path(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Experiment, override(MINIMAL, [setting]), name="my.json")
    assert str(error.value) == f"my.json: {message}"


@dataclass(frozen=True, config=STRICT)
class Circle:
    radius: float
    kind: Literal["circle"] = "circle"


@dataclass(frozen=True, config=STRICT)
class Box:
    box: float
    """A key that is also a tag."""
    kind: Literal["box"] = "box"


def kind_of_shape(value: Any) -> str | None:
    return value.get("kind", "box") if isinstance(value, dict) else None


@dataclass(frozen=True, config=STRICT)
class Drawing:
    shapes: tuple[Annotated[Circle | Box, Field(discriminator="kind")], ...] = ()
    frame: Annotated[Annotated[Circle, Tag("circle")] | Annotated[Box, Tag("box")], Discriminator(kind_of_shape)] = (
        Circle(1.0)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shapes": [{"kind": "box", "box": 1}, {"kind": "circle", "radus": 1, "radius": 1}]},
         "shapes.1.radus: unknown key; did you mean 'radius'?"),
        ({"shapes": [{"kind": "box"}]}, "shapes.0.box: is required and missing"),
        ({"shapes": [{"kind": "box", "box": "x"}]}, 'shapes.0.box: input should be a valid number, not "x"'),
        ({"shapes": [{"box": 1}]}, "shapes.0.kind: is required and missing"),
        ({"frame": {"box": "x"}}, 'frame.box: input should be a valid number, not "x"'),
        ({"frame": {"box": 1, "bx": 1}}, "frame.bx: unknown key; did you mean 'box'?"),
        ({"frame": {"kind": "line"}}, "frame: input should be one of 'circle', 'box', not \"line\""),
        ({"frame": 3}, "frame: input should be an object, not 3"),
    ],
)  # fmt: skip
def test_paths_do_not_show_the_members_of_unions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Drawing, values)
    assert str(error.value) == f"config: {message}"


def test_a_section_of_earlier_versions_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match=r"\(top level\): input should be an object, not 1"):
        from_dict(Experiment, 1)


def test_a_docstring_under_a_field_describes_it() -> None:
    properties = json_schema(Box)["properties"]
    assert properties["box"]["description"] == "A key that is also a tag."
    assert "description" not in properties["kind"]


def test_a_range_may_be_one_point() -> None:
    assert require_rising((1.0, 1.0)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="the lowest value 3 is above the highest 2"):
        require_rising((3.0, 2.0))


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^config: name: .* not 3; seed: .* not \"x\"; zz: unknown key"):
        from_dict(Experiment, {**MINIMAL, "name": 3, "seed": "x", "zz": 1})


def test_overrides() -> None:
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert override(values, ["a.b=5", "e.f.g=[1, 2]", "d=text", "a.c=null", "h=a=b"]) == {
        "a": {"b": 5, "c": None}, "d": "text", "e": {"f": {"g": [1, 2]}}, "h": "a=b",
    }  # fmt: skip
    assert values == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("a.b", "--set a.b: write it as key=value"),
        ("=3", "--set =3: write it as key=value"),
        ("d.x=1", "--set d.x=1: d is a value, not a section"),
    ],
)
def test_invalid_overrides(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"d": 3}, [item])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"name": "x",}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"name": "x", "name": "y"}', "the key 'name' appears twice"),
        (b'{"data": {"train": {}, "train": {}}}', "the key 'train' appears twice"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_files_without_a_config(tmp_path: Path, text: bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"a\.json: .*{message}"):
        load_config(Experiment, tmp_path / "a.json")


def test_a_file_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(MINIMAL))
    assert load_config(Experiment, tmp_path / "a.json", ["training.epochs=3", "name=y"]).training.epochs == 3
    with pytest.raises(ConfigError, match=r"a\.json: training\.epochs: input should be greater than 0, not 0"):
        load_config(Experiment, tmp_path / "a.json", ["training.epochs=0"])
