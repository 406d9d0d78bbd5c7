"""WSJ0-2mix by the lists of SpEx+ (Ge et al., arXiv 2005.04686; github.com/gemengtju/SpEx_Plus, data/wsj0_2mix).

`mix.scp`, `ref.scp` and `aux.scp` hold lines `key path` for mixture, target and enrollment. A key is the mixture's
name and that of the enrollment, `052a050b_0.60383_443c020a_-0.60383_052c010r`: two utterances with their levels in
dB, then an utterance of the target speaker, who is its first three characters. Each mixture has one key for each
speaker (WSJ0-2mix) or one key (WSJ0-2mix-extr).
"""

from pathlib import Path

from onevoice.errors import CorpusError
from onevoice.trials.checks import Asked, Listed, require_folder
from onevoice.trials.config import Wsj0Trials
from onevoice.trials.trials import Trial

SPEAKER_CHARACTERS = 3


def ask_wsj0(config: Wsj0Trials) -> Listed:
    """Return the trials in the order of `mix.scp`, and a line for each key that cannot be one.

    Raises `CorpusError` for a list that is not there or holds a line that is not `key path`.
    """
    folder = require_folder(config.lists, "a folder with mix.scp, ref.scp and aux.scp")
    mixtures, targets, enrollments = (_read_scp(folder / name, config) for name in ("mix.scp", "ref.scp", "aux.scp"))
    asked: list[Asked] = []
    problems = [
        f"{folder / name}: key {key!r} is not in mix.scp"
        for name, entries in (("ref.scp", targets), ("aux.scp", enrollments))
        for key in entries
        if key not in mixtures
    ]
    for key, mixture in mixtures.items():
        lacking = [name for name, entries in (("ref.scp", targets), ("aux.scp", enrollments)) if key not in entries]
        problem = f"key {key!r} is not in {lacking[0]}" if lacking else _contradiction(key, enrollments[key])
        if problem:
            problems.append(f"{folder / 'mix.scp'}: {problem}")
            continue
        trial = Trial(key, _speaker(key.split("_")[-1]), mixture, enrollments[key], targets[key])
        files = (mixture, targets[key], enrollments[key])
        asked.append(Asked(trial, tuple((file, config.sample_rate) for file in files)))
    return Listed(asked, problems, [])


def _contradiction(key: str, enrollment: Path) -> str | None:
    """Say what is wrong with a key; utterances are checked where it has the five parts of WSJ0-2mix."""
    *mixture, wanted = key.split("_")
    if not mixture or not wanted or set(key) & set("/\\\0"):
        return f"key {key!r} is not MIXTURE_ENROLLMENT"
    if enrollment.stem != wanted:
        return f"key {key!r} names another enrollment than aux.scp, {enrollment}"
    if len(mixture) == 4:
        utterances = mixture[::2]
        if wanted in utterances:
            return f"key {key!r} has the target itself as enrollment"
        if _speaker(wanted) not in map(_speaker, utterances):
            return f"key {key!r} has an enrollment of a speaker who is not in the mixture"
    return None


def _speaker(utterance: str) -> str:
    return utterance[:SPEAKER_CHARACTERS]


def _read_scp(path: Path, config: Wsj0Trials) -> dict[str, Path]:
    """Read one list, with the beginnings of its paths replaced; the longest beginning that fits goes first."""
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
            raise CorpusError(f"{path}:{number}: key {key!r} stands twice; remove one line")
        file = rest[0].strip()
        for start in sorted(config.replace, key=len, reverse=True):
            if file.startswith(start):
                file = config.replace[start] + file.removeprefix(start)
                break
        entries[key] = Path(file)
    return entries
