"""Lists the trials of WSJ0-2mix by the lists of SpEx+ (Ge et al., arXiv 2005.04686; gemengtju/SpEx_Plus on GitHub).

`mix.scp`, `ref.scp` and `aux.scp` hold lines `key path` for mixture, target and enrollment. A key is the name of the
mixture and that of the enrollment, `052a050b_0.60383_443c020a_-0.60383_052c010r`: two utterances with their levels in
dB, then an utterance of the target speaker, who is named by its first three characters. Each mixture has one key per
speaker (WSJ0-2mix) or one key in total (WSJ0-2mix-extr).
"""

from pathlib import Path

from onevoice.errors import CorpusError
from onevoice.trials.config import Wsj0Trials
from onevoice.trials.trial import Candidate, Listing, Trial, require_folder

SPEAKER_CHARACTERS = 3


def list_wsj0(config: Wsj0Trials) -> Listing:
    """List the trials in the order of `mix.scp`.

    Raises `CorpusError` for a list that is missing or has a line that is not `key path`.
    """
    folder = require_folder(config.lists, "a folder with mix.scp, ref.scp and aux.scp")
    mixtures, targets, enrollments = (_read_scp(folder / name, config) for name in ("mix.scp", "ref.scp", "aux.scp"))
    others = (("ref.scp", targets), ("aux.scp", enrollments))
    candidates: list[Candidate] = []
    problems = [
        f"{folder / name}: key {key!r} is not in mix.scp"
        for name, entries in others
        for key in entries
        if key not in mixtures
    ]
    for key, mixture in mixtures.items():
        missing = [name for name, entries in others if key not in entries]
        problem = f"key {key!r} is not in {missing[0]}" if missing else _contradiction(key, enrollments[key])
        if problem:
            problems.append(f"{folder / 'mix.scp'}: {problem}")
            continue
        trial = Trial(key, _speaker(key.split("_")[-1]), mixture, enrollments[key], targets[key])
        files = (mixture, targets[key], enrollments[key])
        candidates.append(Candidate(trial, tuple((file, config.sample_rate) for file in files)))
    return Listing(candidates, problems, [])


def _contradiction(key: str, enrollment: Path) -> str | None:
    """Return what is wrong with a key, if anything. Utterances are checked if it has the five parts of WSJ0-2mix."""
    *mixture, enrolled_utterance = key.split("_")
    if not mixture or not enrolled_utterance or set(key) & set("/\\\0"):
        return f"key {key!r} is not MIXTURE_ENROLLMENT"
    if enrollment.stem != enrolled_utterance:
        return f"key {key!r} names another enrollment than aux.scp, {enrollment}"
    if len(mixture) == 4:
        utterances = mixture[::2]
        if enrolled_utterance in utterances:
            return f"key {key!r} has the target itself as enrollment"
        if _speaker(enrolled_utterance) not in map(_speaker, utterances):
            return f"key {key!r} has an enrollment of a speaker who is not in the mixture"
    return None


def _speaker(utterance: str) -> str:
    return utterance[:SPEAKER_CHARACTERS]


def _read_scp(path: Path, config: Wsj0Trials) -> dict[str, Path]:
    """Read one list and replace the prefixes of its paths; of several prefixes that match, the longest one counts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    entries: dict[str, Path] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise CorpusError(f"{path}:{number}: has no path; each line is a key and a path")
        if key in entries:
            raise CorpusError(f"{path}:{number}: key {key!r} appears twice; remove one line")
        file = rest[0].strip()
        for prefix in sorted(config.replace, key=len, reverse=True):
            if file.startswith(prefix):
                file = config.replace[prefix] + file.removeprefix(prefix)
                break
        entries[key] = Path(file)
    return entries
