"""The score of a network on the validation trials."""

import importlib.util
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from onevoice.audio import Mono
from onevoice.errors import ConfigError, CorpusError, MetricError, MissingDependencyError
from onevoice.evaluation.metrics import pesq
from onevoice.models import Network, to_network
from onevoice.training.distributed import Group
from onevoice.training.loss import MultiLoss, si_sdr, suppression
from onevoice.training.tracking import SoundKind
from onevoice.trials.reading import TrialBatch


class Judge(NamedTuple):
    """What a validation measures besides SI-SDR."""

    loss: MultiLoss
    sample_rate: int
    """In Hz."""
    pesq_trials: frozenset[str] = frozenset()
    """Names of the trials whose PESQ is measured."""


class TrialScore(NamedTuple):
    """The scores of one trial."""

    si_sdr: tuple[float, ...]
    """SI-SDR of each estimate in dB."""
    improvement: float | None
    """SI-SDRi of the first estimate in dB; None if the target is silent."""
    suppression: float
    """In dB."""
    loss: float
    """The mean loss of its batch. The speakers of validation are unknown to the classifier and add nothing."""
    pesq: float | None
    """MOS-LQO of the first estimate; None if it is not asked for or has no value."""


@torch.no_grad()
def score_trials(
    model: Network,
    trials: Iterable[TrialBatch],
    device: torch.device,
    judge: Judge,
    on_batch: Callable[[TrialBatch, Tensor], None] = lambda batch, estimate: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrialScore] | None:
    """Score the estimates of each trial; `on_batch` gets each batch with its first estimates.

    Returns None if `should_stop` returns True before all trials are scored.
    """
    model.eval()
    scores: list[TrialScore] = []
    for batch in trials:
        if should_stop():
            return None
        inputs, target = to_network(batch, device), batch["target"].to(device)
        prediction, length = model(inputs), inputs.get("audio_length")
        estimates = prediction["predicted_audio"]
        ratios = torch.stack([si_sdr(estimate, target, length) for estimate in estimates], 1)
        gain = ratios[:, 0] - si_sdr(inputs["audio"], target, length)
        present, below = target.abs().amax(1) > 0, suppression(estimates[0], inputs["audio"], length)
        loss = float(judge.loss(prediction, target, batch["speaker"].to(device), length, inputs["audio"]).total)
        on_batch(batch, estimates[0])
        rows = torch.cat([ratios, torch.stack([gain, below, present], 1)], 1).tolist()
        for row, (*own, improvement, down, speaks) in enumerate(rows):
            heard = sounds(batch, estimates[0], row) if batch["name"][row] in judge.pesq_trials else None
            quality = None if heard is None else _pesq(heard, judge.sample_rate)
            scores.append(TrialScore(tuple(own), improvement if speaks else None, down, loss, quality))
    return scores


def validate(
    model: Network,
    trials: Iterable[TrialBatch],
    device: torch.device,
    group: Group,
    judge: Judge,
    on_batch: Callable[[TrialBatch, Tensor], None],
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Return the mean scores over the trials of all processes.

    `si_sdr_db` and `si_sdri_db` are those of the first estimate, `si_sdr_2_db` and so on of the others. Trials whose
    target is silent have neither; the mean suppression of their mixtures is `absent_suppression_db`. `loss` is the mean
    over all trials, `pesq` over the trials of the judge that have a value. Returns {} if any process has to stop before
    its trials are scored.
    """
    own = score_trials(model, trials, device, judge, on_batch, should_stop)
    if group.any(own is None):
        return {}
    scores = group.gather(own or [])
    speaking = [(*score.si_sdr, score.improvement) for score in scores if score.improvement is not None]
    if not speaking:
        raise CorpusError("data.validation: every target is silent, so no trial can be scored")
    *ratios, gain = torch.tensor(speaking, dtype=torch.float64).mean(0).tolist()
    optional = {
        "absent_suppression_db": [score.suppression for score in scores if score.improvement is None],
        "pesq": [score.pesq for score in scores if score.pesq is not None],
    }
    return {
        "si_sdr_db": ratios[0],
        "si_sdri_db": gain,
        "loss": statistics.fmean(score.loss for score in scores),
        **{f"si_sdr_{number}_db": ratio for number, ratio in enumerate(ratios[1:], 2)},
        **{name: statistics.fmean(values) for name, values in optional.items() if values},
    }


def require_pesq(count: int, sample_rate: int) -> None:
    """Raise before any work if PESQ is asked for and cannot be measured.

    Raises `MissingDependencyError` without the package, `ConfigError` at a rate for which PESQ is not defined.
    """
    if count and importlib.util.find_spec("pesq") is None:
        raise MissingDependencyError(
            'tracking.pesq_examples: needs pesq: pip install "onevoice[eval]" (a C compiler builds it), or set it to 0'
        )
    if count and sample_rate not in (8000, 16000):
        raise ConfigError(
            f"tracking.pesq_examples: PESQ is defined at 8000 and 16000 Hz, and the network works at {sample_rate} Hz; "
            "set it to 0"
        )


def _pesq(heard: dict[SoundKind, Mono], sample_rate: int) -> float | None:
    try:
        return pesq(heard["estimate"], heard["target"], sample_rate)
    except MetricError:
        return None


def sounds(batch: TrialBatch, estimate: Tensor, row: int) -> dict[SoundKind, Mono]:
    """Return the sounds of one item of a batch."""
    length, ref_length = int(batch["audio_length"][row]), int(batch["ref_length"][row])
    return {
        "mixture": batch["audio"][row, :length].numpy(),
        "target": batch["target"][row, :length].numpy(),
        "estimate": estimate[row, :length].float().cpu().numpy(),
        "enrollment": batch["ref"][row, :ref_length].numpy(),
    }
