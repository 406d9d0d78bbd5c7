"""Speech by speaker: which recordings belong to whom, how much there is, and what is wrong with it.

    corpus = scan_corpus(["LibriSpeech/train-clean-100", "shards"])   # looks at every header
    print(report(corpus))
    corpus.require(max_broken=0.01)
    parts = split_speakers(corpus.speakers, {"train": 0.9, "validation": 0.1}, seed=0)

Broken recordings are left out and named; `Corpus.require` refuses a corpus with too many. How corpora are laid out:
`onevoice.corpus.layouts`. `scan` is the short form for mixtures from files.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onevoice.audio import require_not_silent
from onevoice.corpus.layouts import list_source
from onevoice.corpus.recordings import Fault, Listing, Recording, Utterance
from onevoice.errors import AudioError, ConfigError, CorpusError
from onevoice.processes import ordered_map
from onevoice.rng import derive_seed

CHUNK = 64
"""Files that a process looks at in one go."""
MAX_BROKEN = 0.01
"""Share of broken recordings up to which a corpus is used without them."""


@dataclass(frozen=True)
class Speaker:
    """A speaker and their sound files, sorted: paths, or a `Recording` where the sound is a member of a tar shard."""

    id: str
    files: tuple[Path | Recording, ...]


@dataclass(frozen=True)
class Corpus:
    """The usable utterances of one or several sources, sorted by speaker and id, and what was left out.

    `layouts` has one entry per source. `shared_names` counts names that several speakers use; the ids differ by the
    speaker. `joined` counts speakers found in several sources, who are taken for one person. `passed_over` says what
    was rightly not read: how many, why, and an example.
    """

    layouts: tuple[str, ...]
    utterances: tuple[Utterance, ...]
    faults: tuple[Fault, ...] = ()
    passed_over: tuple[tuple[int, str, str], ...] = ()
    shared_names: int = 0
    joined: int = 0

    @functools.cached_property
    def speakers(self) -> dict[str, tuple[Utterance, ...]]:
        """The utterances of each speaker, speakers sorted."""
        groups = itertools.groupby(self.utterances, key=lambda utterance: utterance.speaker)
        return {speaker: tuple(group) for speaker, group in groups}

    @functools.cached_property
    def genders(self) -> dict[str, str]:
        """The gender of each speaker for whom one is known."""
        return {each.speaker: each.gender for each in reversed(self.utterances) if each.gender is not None}

    @property
    def seconds(self) -> float:
        """The duration of all utterances that have been looked at."""
        return sum(utterance.seconds or 0.0 for utterance in self.utterances)

    @property
    def broken_share(self) -> float:
        """The share of utterances that are broken, of all that were found."""
        return broken_share(self.faults, len(self.utterances))

    def of(self, speakers: Iterable[str]) -> "Corpus":
        """Return the part of the corpus that `speakers` are, without the list of what is broken."""
        kept = set(speakers)
        utterances = tuple(utterance for utterance in self.utterances if utterance.speaker in kept)
        return Corpus(self.layouts, utterances)

    def require(self, max_broken: float = MAX_BROKEN) -> None:
        """Raise `CorpusError` when more than the share `max_broken` is broken, or nothing is left."""
        require_share(self.faults, len(self.utterances), max_broken)
        if not self.utterances:
            raise CorpusError("no usable utterance is left in the corpus")


def list_corpus(
    sources: Sequence[str | Path],
    *,
    layout: str | None = None,
    pattern: str | None = None,
    genders: Mapping[str, str] | None = None,
) -> Corpus:
    """Return what folders, tar shards and manifests hold; no sound file is opened.

    A speaker may be spread over sources of one layout, as over shards. An id that stands twice is a fault: the
    first one counts. `genders` by speaker go before those of the corpus.

    Raises `CorpusError` when a source holds nothing, or one name of a speaker stands in different layouts.
    """
    listings = [list_source(Path(source), layout, pattern) for source in sources]
    homes: dict[str, set[tuple[int, str]]] = {}
    for number, (name, listing) in enumerate(listings):
        for utterance in listing.utterances:
            homes.setdefault(utterance.speaker, set()).add((number, name))
    for speaker, places in homes.items():
        if len({name for _, name in places}) > 1:
            found = " and ".join(str(sources[number]) for number, _ in sorted(places)[:2])
            raise CorpusError(f"{found}: both have a speaker {speaker!r}; rename one, e.g. by a manifest")
    kept, faults = _unique(listing for _, listing in listings)
    return Corpus(
        layouts=tuple(name for name, _ in listings),
        utterances=tuple(_with_gender(utterance, genders or {}) for utterance in kept),
        faults=tuple(faults),
        passed_over=_passed_over([listing for _, listing in listings]),
        shared_names=_shared_names(kept),
        joined=sum(len(places) > 1 for places in homes.values()),
    )


def scan_corpus(
    sources: Sequence[str | Path],
    *,
    layout: str | None = None,
    pattern: str | None = None,
    genders: Mapping[str, str] | None = None,
    decode: bool = False,
    workers: int = 1,
) -> Corpus:
    """Do the same as `list_corpus`, and look at every file: length, rate, and whether it is broken.

    Only headers are read, which does not show damage in the middle of a FLAC or MP3 file; with `decode` all
    sound is decoded, and NaN and silence are found too. The result does not depend on `workers`.
    """
    corpus = list_corpus(sources, layout=layout, pattern=pattern, genders=genders)
    chunks = [corpus.utterances[start : start + CHUNK] for start in range(0, len(corpus.utterances), CHUNK)]
    make = functools.partial(_Examiner, decode)
    found: list[Utterance] = []
    faults = list(corpus.faults)
    with contextlib.closing(ordered_map(make, chunks, max(1, min(workers, len(chunks))))) as results:
        for result in itertools.chain.from_iterable(results):
            if isinstance(result, Fault):
                faults.append(result)
            else:
                found.append(result)
    return dataclasses.replace(corpus, utterances=tuple(found), faults=tuple(faults))


def split_speakers(speakers: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Deal the speakers out to parts so that no speaker is in two.

    The part of a speaker depends on `seed`, their name and the fractions alone: recordings and speakers can be
    added later without anybody changing sides. The sizes therefore follow the fractions only roughly.

    Raises `ConfigError` for fractions that are not positive or do not add up to 1, `CorpusError` for a part that
    stays empty.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(f"split {dict(fractions)}: the fractions must be positive and add up to 1")
    bounds = list(itertools.accumulate(fractions.values()))
    parts: dict[str, list[str]] = {part: [] for part in fractions}
    for speaker in sorted(set(speakers)):
        draw = derive_seed(seed, "split", speaker) / 2**128
        place = sum(draw >= bound for bound in bounds[:-1])
        parts[list(fractions)[place]].append(speaker)
    for part, members in parts.items():
        if not members:
            raise CorpusError(f"no speaker fell into the part {part!r}; give it a larger fraction or another seed")
    return parts


def broken_share(faults: Iterable[Fault], usable: int) -> float:
    """Return the share of broken utterances when `usable` ones are left; 0 for nothing at all."""
    broken = sum(fault.utterances for fault in faults)
    return broken / (broken + usable) if broken else 0.0


def require_share(faults: Sequence[Fault], usable: int, max_broken: float) -> None:
    """Raise `CorpusError` when the share of broken utterances is above `max_broken`."""
    share = broken_share(faults, usable)
    if share > max_broken:
        raise CorpusError(
            f"{share:.2%} of the utterances are broken or left out, more than {max_broken:.2%}; the first: "
            f"{faults[0]}; put them right, or allow more by --max-broken {min(1.0, share * 1.01):.2g}"
        )


def report(corpus: Corpus, show: int = 10) -> str:
    """Return what is in a corpus, in lines for people; at most `show` broken files are named."""
    counts = [len(group) for group in corpus.speakers.values()] or [0]
    rates = Counter(each.sample_rate for each in corpus.utterances if each.sample_rate)
    genders = Counter(corpus.genders.get(speaker, "unknown") for speaker in corpus.speakers)
    layouts = Counter(corpus.layouts)
    lines = [
        f"layout        {', '.join(f'{name} × {n}' if n > 1 else name for name, n in layouts.items())}",
        f"speakers      {len(corpus.speakers)} ({', '.join(f'{n} {kind}' for kind, n in sorted(genders.items()))})",
        f"utterances    {len(corpus.utterances)}",
        f"hours         {corpus.seconds / 3600:.2f}",
        f"sample rates  {', '.join(f'{rate} Hz × {n}' for rate, n in sorted(rates.items())) or 'not looked at'}",
        f"per speaker   {min(counts)} to {max(counts)} utterances, median {statistics.median(counts):g}",
    ]
    if corpus.joined:
        lines.append(f"joined        {corpus.joined} speakers of several sources, each taken for one person")
    if corpus.shared_names:
        lines.append(f"same names    {corpus.shared_names} names are used by several speakers; ids tell them apart")
    lines += [f"passed over   {n} files {why}, such as {example}" for n, why, example in corpus.passed_over]
    lines.append(f"left out      {len(corpus.faults)} ({corpus.broken_share:.2%} of the utterances)")
    lines += [f"  {fault}" for fault in corpus.faults[:show]]
    if len(corpus.faults) > show:
        lines.append(f"  … and {len(corpus.faults) - show} more")
    return "\n".join(lines)


def scan(root: str | Path, pattern: str | None = None) -> list[Speaker]:
    """Return the speakers of one corpus with their files, for mixtures: `list_corpus` in its shortest form."""
    return files_by_speaker(list_corpus([root], pattern=pattern))


def files_by_speaker(corpus: Corpus) -> list[Speaker]:
    """Return the speakers sorted by name, each with their files sorted by path and, in a tar shard, by name."""
    speakers = []
    for name, utterances in corpus.speakers.items():
        sources = sorted((each.source for each in utterances), key=lambda source: (source.path, source.name))
        files = tuple(source.path if source.size is None else source for source in sources)
        speakers.append(Speaker(name, files))
    return speakers


class _Examiner:
    """What one process does: look at utterances, and give each back with its length and rate, or what is wrong."""

    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def __call__(self, utterances: Sequence[Utterance]) -> list[Utterance | Fault]:
        return [self._examine(utterance) for utterance in utterances]

    def _examine(self, utterance: Utterance) -> Utterance | Fault:
        try:
            length, rate = _decoded(utterance.source) if self.decode else utterance.source.probe()
        except AudioError as error:
            return utterance.source.fault(error)
        return dataclasses.replace(utterance, seconds=length / rate, sample_rate=rate)


def _decoded(source: Recording) -> tuple[int, int]:
    samples, rate = source.read()
    require_not_silent(samples, source.name)
    return len(samples), rate


def _unique(listings: Iterable[Listing]) -> tuple[list[Utterance], list[Fault]]:
    """Return the utterances sorted, each id once, and the faults, those of further ones with the same id included."""
    first: dict[str, Utterance] = {}
    faults: list[Fault] = []
    for listing in listings:
        faults += listing.faults
        for utterance in listing.utterances:
            there = first.setdefault(utterance.id, utterance)
            if there is not utterance:
                reason = f"duplicate of the utterance {utterance.id}, already found as {there.source.name}"
                faults.append(Fault(utterance.source.name, reason))
    return sorted(first.values(), key=lambda utterance: (utterance.speaker, utterance.id)), faults


def _with_gender(utterance: Utterance, genders: Mapping[str, str]) -> Utterance:
    gender = genders.get(utterance.speaker, utterance.gender)
    return utterance if gender == utterance.gender else dataclasses.replace(utterance, gender=gender)


def _passed_over(listings: Sequence[Listing]) -> tuple[tuple[int, str, str], ...]:
    total = sum((listing.passed_over for listing in listings), Counter[str]())
    examples = {why: name for listing in reversed(listings) for why, name in listing.examples.items()}
    return tuple((count, why, examples[why]) for why, count in sorted(total.items()))


def _shared_names(utterances: Iterable[Utterance]) -> int:
    names = Counter(utterance.id.removeprefix(f"{utterance.speaker}/") for utterance in utterances)
    return sum(count > 1 for count in names.values())
