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


class Score(NamedTuple):
    """What a trial gave, in dB; `improvement` is None where the target is silent."""

    si_sdr: float
    improvement: float | None
    suppression: float


@torch.no_grad()
def validate(
    model: Network,
    trials: Iterable[TrialBatch],
    device: torch.device,
    group: Group,
    show: Callable[[TrialBatch, Tensor], None],
    stopped: Callable[[], bool],
) -> dict[str, float]:
    """Return the mean SI-SDR and SI-SDRi in dB over the trials of all processes, by the first estimate.

    Trials whose target is silent have neither; their mean suppression below the mixture stands beside. `show` gets
    each batch with its estimates. Returns {} when `stopped` says so in some process before all is scored.
    """
    model.eval()
    own: list[Score] = []
    broken_off = False
    for batch in trials:
        broken_off = stopped()
        if broken_off:
            break
        inputs, target = to_network(batch, device), batch["target"].to(device)
        estimate = model(inputs)["predicted_audio"][0]
        length = inputs.get("audio_length")
        after, before = si_sdr(estimate, target, length), si_sdr(inputs["audio"], target, length)
        present, pressed = target.abs().amax(1) > 0, suppression(estimate, inputs["audio"], length)
        show(batch, estimate)
        rows = torch.stack([after, after - before, pressed, present.float()], 1).tolist()
        own += [Score(a, gain if speaks else None, down) for a, gain, down, speaks in rows]
    if group.any(broken_off):
        return {}
    return _means(group.gather(own))


def _means(scores: list[Score]) -> dict[str, float]:
    speaking = [(score.si_sdr, score.improvement) for score in scores if score.improvement is not None]
    pressed = [score.suppression for score in scores if score.improvement is None]
    if not speaking:
        raise CorpusError("data.validation: the target speaks in none of its trials, so none can be scored")
    means = torch.tensor(speaking, dtype=torch.float64).mean(0)
    suppressed = {"absent_suppression_db": sum(pressed) / len(pressed)} if pressed else {}
    return {"si_sdr_db": float(means[0]), "si_sdri_db": float(means[1]), **suppressed}


def sounds(batch: TrialBatch, estimate: Tensor, row: int) -> dict[SoundKind, Mono]:
    """Return what there is to hear of one item of a batch."""
    length, ref_length = int(batch["audio_length"][row]), int(batch["ref_length"][row])
    return {
        "mixture": batch["audio"][row, :length].numpy(),
        "target": batch["target"][row, :length].numpy(),
        "estimate": estimate[row, :length].float().cpu().numpy(),
        "enrollment": batch["ref"][row, :ref_length].numpy(),
    }
