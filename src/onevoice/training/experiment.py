"""A complete experiment as one frozen config: what `train.py --c FILE` reads and a run folder keeps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT
from onevoice.errors import ConfigError
from onevoice.mixing.draw import ChannelStep, MixingStep, NoiseStep, ReverbStep
from onevoice.models import ModelConfig, SpExPlusConfig
from onevoice.training.loss import MultiLoss
from onevoice.training.tracking import TrackingConfig
from onevoice.trials.config import (
    Folder,
    LibriMix,
    LibriMixMetadata,
    TrialsConfig,
    Wsj0,
    flatten_trial_set,
    kind,
)

OpenFraction = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class DynamicTrials:
    """Mixtures drawn at every step from packed speech; every stage except mixing is off by default."""

    pack: str
    """A folder written by `onevoice corpus pack`."""
    kind: Literal["dynamic"] = "dynamic"
    """The data set: mixtures drawn at every step."""
    examples_per_epoch: PositiveInt = 20_000
    """Number of mixtures per epoch."""
    on_device: bool = False
    """Keep the packs in the memory of the training device and render there, instead of in worker processes."""
    mixing: MixingStep = MixingStep()
    """How voices are mixed."""
    noise: NoiseStep | None = None
    """Noise to add; null for none."""
    reverb: ReverbStep | None = None
    """Rooms to simulate; null for none."""
    channel: ChannelStep | None = None
    """Distortions of the enrollment; null for none."""


TrainingData = Annotated[
    Folder | LibriMix | LibriMixMetadata | Wsj0 | Annotated[DynamicTrials, Tag("dynamic")], Discriminator(kind)
]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where trials come from and how they are batched."""

    train: TrainingData
    """The training data, by `kind`: a folder of trials, another data set, or mixtures drawn at every step."""
    validation: TrialsConfig
    """The validation trials, by `kind`: a folder of trials or another data set."""
    batch_size: PositiveInt = 8
    """Trials per training step."""
    validation_batch_size: PositiveInt = 1
    """Trials per pass of the network in validation."""
    workers: NonNegativeInt = 2
    """Number of processes that read and decode; the data do not depend on it."""


@dataclass(frozen=True, config=STRICT)
class AdamConfig:
    """Adam (or AdamW), with the values of torch."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.999)


@dataclass(frozen=True, config=STRICT)
class OneCycleConfig:
    """One rise to `max_learning_rate` and one cosine fall over the whole training (torch's OneCycleLR)."""

    name: Literal["onecycle"] = "onecycle"
    max_learning_rate: PositiveFloat = 1e-3
    rising_part: OpenFraction = 0.3
    start_divisor: PositiveFloat = 25.0
    final_divisor: PositiveFloat = 1e4


@dataclass(frozen=True, config=STRICT)
class PlateauConfig:
    """Halve the learning rate when validation stops improving, as the SpEx+ paper does."""

    name: Literal["plateau"] = "plateau"
    factor: OpenFraction = 0.5
    patience_epochs: NonNegativeInt = 2
    min_learning_rate: NonNegativeFloat = 1e-8


@dataclass(frozen=True, config=STRICT)
class ConstantConfig:
    """The optimizer's learning rate throughout."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, config=STRICT)
class StableConfig:
    """Warm-up, stable, decay (arXiv 2404.06395): train at the optimizer's rate as long as you like, decay when wanted.

    The keys that begin with `decay_` may be set or changed when a run is resumed, from any of its checkpoints.
    """

    name: Literal["wsd"] = "wsd"
    warmup_steps: NonNegativeInt = 1000
    decay_steps: PositiveInt | None = None
    """Length of the decay, with whose last step training ends, whatever `training.epochs`; null for no decay."""
    decay_from_step: NonNegativeInt | None = None
    """The step that begins it; null: so that it ends with the last epoch, or, newly set on resuming, at once."""
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    """A straight line, or 1 − √x (arXiv 2405.18392), which leaves the stable rate faster."""
    decay_divisor: Annotated[float, Field(ge=1)] = 100.0
    """The last step of the decay is taken at the stable rate divided by this."""

    def __post_init__(self) -> None:
        """Check that a beginning has a length."""
        if self.decay_from_step is not None and self.decay_steps is None:
            raise ValueError("decay_from_step needs decay_steps, the length of the decay")


SchedulerConfig = Annotated[OneCycleConfig | PlateauConfig | ConstantConfig | StableConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The loop."""

    epochs: PositiveInt = 21
    steps_per_epoch: PositiveInt | None = None
    """End an epoch (validate, save) after so many steps; null for one pass over the data."""
    accumulate: PositiveInt = 1
    """Parts into which each batch is split, one after the other in memory; the step learns from all of them."""
    ema: OpenFraction | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; it is what is validated and shipped."""
    clip_gradient_norm: PositiveFloat = 5.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the matrix products; weights and statistics stay float32. float16 scales the loss."""
    compile: bool = False
    """Compile the network (`torch.compile`): steps several times as fast, after a minute or two at the start."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    save_every_steps: PositiveInt = 500
    """A resumable checkpoint stands on disk at least so often."""
    keep_every_epochs: PositiveInt | None = None
    """Also keep the weights of every so many epochs, as epoch-0010.safetensors, for `onevoice average`."""
    log_every_steps: PositiveInt = 20
    early_stop_epochs: PositiveInt | None = None
    """Stop after so many validations without a better one."""
    max_nonfinite_steps: PositiveInt = 20
    """Steps in a row without a finite loss and gradient after which training gives up; each is skipped."""
    checkpoint_activations: bool = False
    """Compute the temporal blocks a second time in the backward pass instead of keeping their insides in memory."""
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    """Stop with advice, or go on with parts of half the size (`accumulate` doubled for the rest of the run)."""


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """Everything that decides how a run goes."""

    name: str
    data: DataConfig
    seed: int = 0
    runs_folder: str = "runs"
    """The run is kept in `<runs_folder>/<name>`."""
    model: ModelConfig = SpExPlusConfig()
    loss: MultiLoss = MultiLoss()
    optimizer: AdamConfig = AdamConfig()
    scheduler: SchedulerConfig = OneCycleConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @staticmethod
    def upgrade(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rewrite the sections of trials from earlier versions; `from_dict` calls this."""
        data = values.get("data")
        if not isinstance(data, Mapping):
            return values
        trials = {part: flatten_trial_set(data[part]) for part in ("train", "validation") if part in data}
        return {**values, "data": {**data, **trials}}

    def __post_init__(self) -> None:
        """Check that a batch can be split."""
        if self.data.batch_size % self.training.accumulate:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} cannot be split into training.accumulate "
                f"{self.training.accumulate} equal parts"
            )


def fill_model_fields(experiment: Experiment, speakers: int) -> Experiment:
    """Return the experiment with the model fields that training decides: `num_classes` if it is 0, and `has_level`.

    Raises `ConfigError` if the classifier is too small for the training speakers.
    """
    classes = experiment.model.num_classes or speakers
    if classes < speakers:
        raise ConfigError(
            f"model.num_classes: {classes} is too small for the {speakers} speakers of "
            "the training data; set 0 to have them counted"
        )
    model = replace(experiment.model, num_classes=classes, has_level=experiment.loss.level > 0)
    return replace(experiment, model=model)


LASTING = (
    *("model", "loss", "optimizer", "scheduler", "seed", "data.batch_size", "data.train.segment_seconds"),
    *("data.train.enrollment_seconds", "data.train.limit", "data.train.examples_per_epoch", "data.train.mixing"),
    *("data.train.noise", "data.train.reverb", "data.train.channel"),
    *("training.steps_per_epoch", "training.precision", "training.clip_gradient_norm"),
    *("training.accumulate", "training.ema"),
)
"""The settings that a resumed run shares with the run it goes on from; folders may have moved."""


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return which lasting settings differ between two experiments, given as plain JSON values."""

    def at(experiment: Mapping[str, Any], key: str) -> Any:
        node: Any = experiment
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    keys = [*LASTING, *(["training.epochs"] if now["scheduler"]["name"] == "onecycle" else [])]  # they shape the cycle
    return [key for key in keys if _lasting_part(at(saved, key)) != _lasting_part(at(now, key))]


def _lasting_part(value: Any) -> Any:
    """Return a section without places, and without what a scheduler decides late."""
    if not isinstance(value, Mapping):
        return value
    return {key: part for key, part in value.items() if key != "pack" and not key.startswith("decay_")}
