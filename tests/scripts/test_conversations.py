"""Made conversations: what a track, an overlap and a diarization error are."""

from pathlib import Path

import numpy as np
import pytest
from make_conversations import RATE, draw_conversations, is_speaking, make_conversation
from voices import make_corpus
from voices_quality import diarization_error

from onevoice.corpus.listing import list_corpus
from onevoice.rng import derive


def speech() -> dict[str, np.ndarray]:
    return {name: derive(0, name).standard_normal(60 * RATE).astype(np.float32) for name in ("a", "b", "c")}


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.4])
def test_tracks_add_up_and_overlap(overlap: float) -> None:
    made = make_conversation(speech(), overlap, 60.0, derive(1, "test"))
    total = np.sum(list(made.tracks.values()), axis=0)
    assert np.abs(made.mixture - total).max() < 0.01 * np.abs(total).max()
    active = np.stack([is_speaking(track) for track in made.tracks.values()]).sum(axis=0)
    assert active.max() <= 2
    assert (active > 1).sum() / (active > 0).sum() == pytest.approx(overlap, abs=0.08)


def test_the_same_seed_makes_the_same_conversation(tmp_path: Path) -> None:
    corpus = list_corpus([make_corpus(tmp_path, sample_rate=8000)])
    one, other = (draw_conversations(corpus, [2], [0.2], 1, 10.0)[0][1] for _ in range(2))
    np.testing.assert_array_equal(one.mixture, other.mixture)
    assert len(one.tracks) == 2


def test_the_diarization_error() -> None:
    truth = np.zeros((2, 1000), bool)
    truth[0, :500], truth[1, 500:] = True, True
    errors, pairs = diarization_error(truth, truth[::-1])
    assert (errors.tolist(), pairs) == ([0, 0, 0], {0: 1, 1: 0})
    one = np.ones((1, 1000), bool)
    np.testing.assert_allclose(diarization_error(truth, one)[0], [0, 0, 0.5])
    np.testing.assert_allclose(diarization_error(truth, ~one)[0], [1, 0, 0])
    np.testing.assert_allclose(diarization_error(one, np.ones((2, 1000), bool))[0], [0, 1, 0])
    late = np.roll(truth, 20, axis=1)  # within the collar
    late[0, :20], late[1, :20] = True, False
    np.testing.assert_allclose(diarization_error(truth, late)[0], 0)
