"""What is known about a trial comes from the manifest, from names, and from tables of genders."""

import json
from pathlib import Path

import pytest
from tiny import command
from voices import make_trials

from onevoice.errors import CorpusError
from onevoice.evaluation.facts import trial_facts
from onevoice.evaluation.scoring import TrialFacts
from onevoice.trials.config import FolderTrials, LibriMixTrials, TrialsConfig, Wsj0Trials
from onevoice.trials.trial import Trial


def trial(name: str, speaker: str = "") -> Trial:
    return Trial(name, speaker, Path("m.wav"), Path("e.wav"), Path("t.wav"))


def librimix(folder: Path) -> LibriMixTrials:
    return LibriMixTrials(root=str(folder / "Libri2Mix"), part="test", librispeech_dir=str(folder))


@pytest.mark.parametrize(
    ("kind", "name", "speaker", "expected"),
    [
        ("folder", "1089_61_000001", "1089", TrialFacts("set", "1089", "61", "MF")),
        ("folder", "dev-0001", "dev-0001", TrialFacts("set")),
        ("folder", "listed", "listed", TrialFacts("mixed set", "61", "p7", "FM")),
        ("folder", "told", "told", TrialFacts("set", "a", None, "FF")),
        ("librimix", "61-1-1_1089-2-2_s1", "61", TrialFacts("Libri2Mix/test", "61", "1089", "FM")),
        ("librimix", "61-1-1_1089-2-2_s2", "1089", TrialFacts("Libri2Mix/test", "1089", "61", "MF")),
        ("librimix", "61-1-1_1089-2-2_7-1-1_s3", "7", TrialFacts("Libri2Mix/test", "7")),
        ("wsj0", "052a050b_0.6_443c020a_-0.6_052c010r", "052", TrialFacts("wsj0_2mix/tt", "052", "443")),
    ],
)
def test_facts_of_a_trial(tmp_path: Path, kind: str, name: str, speaker: str, expected: TrialFacts) -> None:
    (tmp_path / "SPEAKERS.TXT").write_text("; a comment\n61   | F | test-clean\n1089 | M | test-clean\n")
    (tmp_path / "genders.csv").write_text("speaker,gender\n61,f\n1089,M\np7,male\n")
    (tmp_path / "set").mkdir()
    rows = [
        {"name": "listed", "target_speaker": "61", "interferer_speaker": "p7", "corpus": "mixed set"},
        {"name": "told", "target_speaker": "a", "gender_pair": "ff"},
    ]
    (tmp_path / "set" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs: dict[str, TrialsConfig] = {
        "folder": FolderTrials(str(tmp_path / "set")),
        "librimix": librimix(tmp_path),
        "wsj0": Wsj0Trials(lists=str(tmp_path / "tt")),
    }
    genders = tmp_path / "genders.csv" if kind == "folder" else None
    assert trial_facts(configs[kind], [trial(name, speaker)], genders) == [expected]


def test_a_gender_pair_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"name": "a", "gender_pair": "same"}\n')
    with pytest.raises(CorpusError, match="gender_pair of 'a' is SAME; write one of FF, FM, MF, MM"):
        trial_facts(FolderTrials(str(tmp_path)), [trial("a")])


def test_groups_by_gender_need_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted({path.stem.rsplit("-", 1)[0] for path in make_trials(tmp_path / "trials", 4).glob("*.wav")})
    rows = [{"name": n, "target_speaker": n.split("_")[0], "interferer_speaker": n.split("_")[1]} for n in names]
    (tmp_path / "trials" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "g.csv").write_text("speaker,gender\nspk000,F\nspk001,M\nspk002,M\nspk003,F\n")
    done = command(
        capsys, "eval", "--baseline", "mixture", "-t", tmp_path / "trials", "-j", 1, "--metrics", "si_sdr",
        "--genders", tmp_path / "g.csv", "-o", tmp_path / "r.json",
    )  # fmt: skip
    assert done.status == 0, done.err
    groups = json.loads((tmp_path / "r.json").read_text())["groups"]["gender_pair"]
    letters = {"spk000": "F", "spk001": "M", "spk002": "M", "spk003": "F"}
    pairs = [letters[row["target_speaker"]] + letters[row["interferer_speaker"]] for row in rows]
    assert {pair: group["trials"] for pair, group in groups.items()} == {p: pairs.count(p) for p in sorted(set(pairs))}
