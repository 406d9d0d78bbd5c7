"""A complete experiment as one frozen config: what `train.py --c FILE` reads and a run folder keeps."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic.dataclasses import dataclass

from onevoice.config import FREE, STRICT, Location
from onevoice.errors import ConfigError
from onevoice.mixing.steps import ChannelStep, MixingStep, NoiseStep, ReverbStep
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

    pack: Location
    """A folder written by `onevoice corpus pack`."""
    kind: Literal["dynamic"] = "dynamic"
    """The data set: mixtures drawn at every step."""
    examples_per_epoch: PositiveInt = 20_000
    """Number of mixtures per epoch."""
    on_device: Annotated[bool, FREE] = False
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
    validation: Annotated[TrialsConfig, FREE]
    """The validation trials, by `kind`: a folder of trials or another data set."""
    batch_size: PositiveInt = 8
    """Trials per training step."""
    validation_batch_size: Annotated[PositiveInt, FREE] = 1
    """Trials per pass of the network in validation."""
    workers: Annotated[NonNegativeInt, FREE] = 2
    """Number of processes that read and decode; the data do not depend on it."""


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """Adam or AdamW with torch's default values, or Muon for linear layers and AdamW for the rest."""

    name: Literal["adam", "adamw", "muon"] = "adam"
    """AdamW decouples weight decay from the gradient; Muon orthogonalizes the updates of linear layers."""
    learning_rate: PositiveFloat = 1e-3
    """The learning rate; a scheduler may replace or scale it. Muon scales its updates to the usual size of AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """The weight decay."""
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.999)
    """Decay per step of the running means of the gradient and of its square; with Muon, for all other weights."""
    momentum: OpenFraction = 0.95
    """With Muon: decay per step of its running mean of the gradient."""


@dataclass(frozen=True, config=STRICT)
class OneCycleConfig:
    """One rise to `max_learning_rate` and one cosine fall over the whole training (torch's OneCycleLR)."""

    name: Literal["onecycle"] = "onecycle"
    """The schedule: one cycle."""
    max_learning_rate: PositiveFloat = 1e-3
    """The learning rate at the top of the cycle."""
    rising_part: OpenFraction = 0.3
    """The fraction of all steps in which the rate rises."""
    start_divisor: PositiveFloat = 25.0
    """The cycle starts at `max_learning_rate` divided by this."""
    final_divisor: PositiveFloat = 1e4
    """The cycle ends at the start rate divided by this."""


@dataclass(frozen=True, config=STRICT)
class PlateauConfig:
    """Lower the learning rate when validation stops improving, as the SpEx+ paper does."""

    name: Literal["plateau"] = "plateau"
    """The schedule: lower the rate on a plateau."""
    factor: OpenFraction = 0.5
    """The rate is multiplied by this."""
    patience_epochs: NonNegativeInt = 2
    """Validations without a better score to wait before the rate is lowered."""
    min_learning_rate: NonNegativeFloat = 1e-8
    """The rate is never lower than this."""


@dataclass(frozen=True, config=STRICT)
class ConstantConfig:
    """The optimizer's learning rate throughout."""

    name: Literal["constant"] = "constant"
    """The schedule: a constant rate."""


@dataclass(frozen=True, config=STRICT)
class StableConfig:
    """Warm-up, stable, decay (arXiv 2404.06395): train at the optimizer's rate as long as you like, then decay.

    A resumed run may set or change the keys that begin with `decay_`, from any of its checkpoints.
    """

    name: Literal["wsd"] = "wsd"
    """The schedule: warm-up, stable, decay."""
    warmup_steps: NonNegativeInt = 1000
    """Number of steps in which the rate rises linearly to the optimizer's rate."""
    decay_steps: Annotated[PositiveInt | None, FREE] = None
    """Length of the decay in steps; training ends with it, whatever `training.epochs` is. Null for no decay."""
    decay_from_step: Annotated[NonNegativeInt | None, FREE] = None
    """The first step of the decay. Null ends the decay with the last epoch, or starts it at once if set on resuming."""
    decay_shape: Annotated[Literal["linear", "sqrt"], FREE] = "sqrt"
    """A straight line, or 1 − √x (arXiv 2405.18392), which falls faster at first."""
    decay_divisor: Annotated[float, Field(ge=1), FREE] = 100.0
    """The decay ends at the stable rate divided by this."""

    def __post_init__(self) -> None:
        """Check that a decay with a start has a length."""
        if self.decay_from_step is not None and self.decay_steps is None:
            raise ValueError("decay_from_step needs decay_steps, the length of the decay")


SchedulerConfig = Annotated[OneCycleConfig | PlateauConfig | ConstantConfig | StableConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The training loop."""

    epochs: Annotated[PositiveInt, FREE] = 21
    """Number of epochs. A resumed run may change it unless the schedule is `onecycle`, whose shape depends on it."""
    steps_per_epoch: PositiveInt | None = None
    """Number of steps after which an epoch ends (validation, save). More than a pass goes round the data again, in
    another order; null for one pass."""
    accumulate: PositiveInt = 1
    """Number of equal parts of each batch that are in memory one after the other; the step learns from all of them."""
    ema: OpenFraction | None = None
    """Decay of a running average of the weights, which is what is validated and shipped; null for none."""
    clip_gradient_norm: PositiveFloat | None = 5.0
    """Maximum norm of the gradient; a larger one is scaled down to it. Null for no limit."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the matrix products; weights and statistics stay float32. auto is bfloat16 on a processor or GPU that
    multiplies in it, and float32 on others. float16 scales the loss."""
    compile: Annotated[bool, FREE] = False
    """Compile the network (`torch.compile`): steps take half the time or less, after a start of a minute or two."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], FREE] = "auto"
    """Where to train; auto takes CUDA, then MPS, then the CPU."""
    save_every_steps: Annotated[PositiveInt, FREE] = 500
    """Write a checkpoint to resume from every so many steps, besides one per epoch."""
    keep_every_epochs: Annotated[PositiveInt | None, FREE] = None
    """Also keep the weights of every so many epochs, as epoch-NNNN.safetensors; null for none."""
    log_every_steps: Annotated[PositiveInt, FREE] = 20
    """Write a log line, with means over the steps since the last one, every so many steps."""
    early_stop_epochs: Annotated[PositiveInt | None, FREE] = None
    """Stop after so many validations without a better one; null for never."""
    max_nonfinite_steps: Annotated[PositiveInt, FREE] = 20
    """Stop after so many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    checkpoint_activations: Annotated[bool, FREE] = False
    """Save memory: compute the temporal blocks again in the backward pass instead of keeping their activations."""
    on_out_of_memory: Annotated[Literal["stop", "halve"], FREE] = "stop"
    """If memory runs out, stop with advice, or double `accumulate` for the rest of the run."""


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """Everything that determines a run."""

    name: Annotated[str, FREE]
    """Name of the run, and of its folder."""
    data: DataConfig
    """Training and validation data."""
    seed: int = 0
    """Seed of the weights and of every random draw."""
    runs_folder: Location = "runs"
    """The run folder is `<runs_folder>/<name>`."""
    model: ModelConfig = SpExPlusConfig()
    """The network."""
    loss: MultiLoss = MultiLoss()
    """The training loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    scheduler: SchedulerConfig = OneCycleConfig()
    """The schedule of the learning rate."""
    training: TrainingConfig = TrainingConfig()
    """Length, precision, device, checkpoints and logging of training."""
    tracking: Annotated[TrackingConfig, FREE] = TrackingConfig()
    """What is recorded."""

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

    Without `loss.lambd` no classifier is needed, so its size may stay 0. Raises `ConfigError` if the classifier is too
    small for the training speakers.
    """
    needed = speakers if experiment.loss.lambd else 0
    classes = experiment.model.num_classes or needed
    if classes < needed:
        raise ConfigError(
            f"model.num_classes: {classes} is too small for the {speakers} speakers of "
            "the training data; set 0 to have them counted"
        )
    model = replace(experiment.model, num_classes=classes, has_level=experiment.loss.level > 0)
    return replace(experiment, model=model)


def changed_settings(saved: Experiment, now: Experiment) -> list[str]:
    """Return the names of the settings that differ although a resumed run must share them with the saved one.

    These are all fields but those marked `FREE`.
    """
    changed = _differences(saved, now, "")
    if isinstance(now.scheduler, OneCycleConfig) and saved.training.epochs != now.training.epochs:
        changed.append("training.epochs")  # it shapes the cycle
    return changed


def _differences(saved: Any, now: Any, name: str) -> list[str]:
    if type(saved) is not type(now) or not is_dataclass(now):
        return [] if saved == now else [name]
    hints = get_type_hints(type(now), include_extras=True)
    return [
        different
        for field in fields(now)
        if not _is_free(hints[field.name])
        for different in _differences(
            getattr(saved, field.name), getattr(now, field.name), f"{name}.{field.name}".removeprefix(".")
        )
    ]


def _is_free(hint: Any) -> bool:
    """Check whether a type, or a member of a union, is marked `FREE`."""
    return FREE in getattr(hint, "__metadata__", ()) or any(_is_free(member) for member in get_args(hint))
