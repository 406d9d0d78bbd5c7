"""The score of a network on the validation trials."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from onevoice.audio import Mono
from onevoice.errors import CorpusError
from onevoice.models import Network, to_network
from onevoice.training.distributed import Group
from onevoice.training.loss import si_sdr, suppression
from onevoice.training.tracking import SoundKind
from onevoice.trials.reading import TrialBatch


class TrialScore(NamedTuple):
    """The scores of one trial in dB; `improvement`, the SI-SDRi, is None if the target is silent."""

    si_sdr: float
    improvement: float | None
    suppression: float


@torch.no_grad()
def score_trials(
    model: Network,
    trials: Iterable[TrialBatch],
    device: torch.device,
    on_batch: Callable[[TrialBatch, Tensor], None] = lambda batch, estimate: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrialScore] | None:
    """Score the first estimate of each trial; `on_batch` gets each batch with its estimates.

    Returns None if `should_stop` returns True before all trials are scored.
    """
    model.eval()
    scores: list[TrialScore] = []
    for batch in trials:
        if should_stop():
            return None
        inputs, target = to_network(batch, device), batch["target"].to(device)
        estimate = model(inputs)["predicted_audio"][0]
        length = inputs.get("audio_length")
        after, before = si_sdr(estimate, target, length), si_sdr(inputs["audio"], target, length)
        speaks, below = target.abs().amax(1) > 0, suppression(estimate, inputs["audio"], length)
        on_batch(batch, estimate)
        rows = torch.stack([after, after - before, below, speaks.float()], 1).tolist()
        scores += [TrialScore(ratio, gain if present else None, down) for ratio, gain, down, present in rows]
    return scores


def validate(
    model: Network,
    trials: Iterable[TrialBatch],
    device: torch.device,
    group: Group,
    on_batch: Callable[[TrialBatch, Tensor], None],
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Return the mean SI-SDR and SI-SDRi in dB over the trials of all processes.

    Trials whose target is silent have neither; the mean suppression of their mixtures is `absent_suppression_db`.
    Returns {} if any process has to stop before its trials are scored.
    """
    own = score_trials(model, trials, device, on_batch, should_stop)
    if group.any(own is None):
        return {}
    scores = group.gather(own or [])
    speaking = [(score.si_sdr, score.improvement) for score in scores if score.improvement is not None]
    suppressed = [score.suppression for score in scores if score.improvement is None]
    if not speaking:
        raise CorpusError("data.validation: every target is silent, so no trial can be scored")
    means = torch.tensor(speaking, dtype=torch.float64).mean(0)
    absent = {"absent_suppression_db": sum(suppressed) / len(suppressed)} if suppressed else {}
    return {"si_sdr_db": float(means[0]), "si_sdri_db": float(means[1]), **absent}


def sounds(batch: TrialBatch, estimate: Tensor, row: int) -> dict[SoundKind, Mono]:
    """Return the sounds of one item of a batch."""
    length, ref_length = int(batch["audio_length"][row]), int(batch["ref_length"][row])
    return {
        "mixture": batch["audio"][row, :length].numpy(),
        "target": batch["target"][row, :length].numpy(),
        "estimate": estimate[row, :length].float().cpu().numpy(),
        "enrollment": batch["ref"][row, :ref_length].numpy(),
    }
