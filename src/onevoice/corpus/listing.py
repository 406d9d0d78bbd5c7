"""Corpora: which recordings belong to which speaker, how much speech there is, and what is broken.

    corpus = scan_corpus(["LibriSpeech/train-clean-100", "shards"])   # reads every header
    print(describe(corpus))
    corpus.require_usable(max_broken=0.01)
    parts = split_speakers(corpus.speakers, {"train": 0.9, "validation": 0.1}, seed=0)

Broken recordings are left out and named, and `Corpus.require_usable` refuses a corpus with too many of them.
`onevoice.corpus.layouts` knows how corpora are laid out. `scan` is the short form for mixtures from files.
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
"""Files per call of a worker."""
MAX_BROKEN = 0.01
"""The largest share of broken recordings that a corpus may have by default."""


@dataclass(frozen=True)
class Speaker:
    """A speaker and their audio files, sorted: paths, or a `Recording` for a member of a tar shard."""

    id: str
    files: tuple[Path | Recording, ...]


@dataclass(frozen=True)
class Corpus:
    """The usable utterances of one or several sources, sorted by speaker and id, and what was left out."""

    layouts: tuple[str, ...]
    """The layout of each source."""
    utterances: tuple[Utterance, ...]
    faults: tuple[Fault, ...] = ()
    """What is broken or a duplicate, and left out."""
    ignored: tuple[tuple[int, str, str], ...] = ()
    """How many files are not meant to be read, with the reason and an example."""
    shared_names: int = 0
    """Names of utterances that several speakers use; their ids differ by the speaker."""
    merged_speakers: int = 0
    """Speakers found in several sources, each counted as one person."""

    @functools.cached_property
    def speakers(self) -> dict[str, tuple[Utterance, ...]]:
        """The utterances of each speaker, sorted by speaker."""
        groups = itertools.groupby(self.utterances, key=lambda utterance: utterance.speaker)
        return {speaker: tuple(group) for speaker, group in groups}

    @functools.cached_property
    def genders(self) -> dict[str, str]:
        """The gender of each speaker whose gender is known."""
        return {each.speaker: each.gender for each in reversed(self.utterances) if each.gender is not None}

    @property
    def seconds(self) -> float:
        """The duration of all inspected utterances in total."""
        return sum(utterance.seconds or 0.0 for utterance in self.utterances)

    @property
    def broken_share(self) -> float:
        """The share of broken utterances among all that were found."""
        return broken_share(self.faults, len(self.utterances))

    def subset(self, speakers: Iterable[str]) -> "Corpus":
        """Return the corpus with only these speakers and without the faults."""
        kept = set(speakers)
        utterances = tuple(utterance for utterance in self.utterances if utterance.speaker in kept)
        return Corpus(self.layouts, utterances)

    def require_usable(self, max_broken: float = MAX_BROKEN) -> None:
        """Raise `CorpusError` if a share above `max_broken` is broken or no utterance is left."""
        require_few_broken(self.faults, len(self.utterances), max_broken)
        if not self.utterances:
            raise CorpusError("no usable utterance is left in the corpus")


def list_corpus(
    sources: Sequence[str | Path],
    *,
    layout: str | None = None,
    pattern: str | None = None,
    genders: Mapping[str, str] | None = None,
) -> Corpus:
    """List the utterances in folders, tar shards and manifests; no audio file is opened.

    A speaker may be spread over several sources of one layout, such as shards. If an id appears twice, the first one
    counts and the other is a fault. `genders` by speaker override those of the corpus.

    Raises `CorpusError` if a source has no utterances, or if sources of different layouts share a speaker's name.
    """
    listings = [list_source(Path(source), layout, pattern) for source in sources]
    places_of: dict[str, set[tuple[int, str]]] = {}
    for number, (name, listing) in enumerate(listings):
        for utterance in listing.utterances:
            places_of.setdefault(utterance.speaker, set()).add((number, name))
    for speaker, places in places_of.items():
        if len({name for _, name in places}) > 1:
            found = " and ".join(str(sources[number]) for number, _ in sorted(places)[:2])
            raise CorpusError(f"{found}: both have a speaker {speaker!r}; rename one, for example in a manifest")
    kept, faults = _without_duplicates(listing for _, listing in listings)
    return Corpus(
        layouts=tuple(name for name, _ in listings),
        utterances=tuple(_with_gender(utterance, genders or {}) for utterance in kept),
        faults=tuple(faults),
        ignored=_ignored([listing for _, listing in listings]),
        shared_names=_shared_names(kept),
        merged_speakers=sum(len(places) > 1 for places in places_of.values()),
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
    """Do what `list_corpus` does, and inspect every file: its length, its sample rate, and whether it is broken.

    Only headers are read, which does not reveal damage in the middle of a FLAC or MP3 file. With `decode`, everything
    is decoded, which also finds NaN and silence. The result does not depend on `workers`.
    """
    corpus = list_corpus(sources, layout=layout, pattern=pattern, genders=genders)
    chunks = [corpus.utterances[start : start + CHUNK] for start in range(0, len(corpus.utterances), CHUNK)]
    make = functools.partial(_Inspector, decode)
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
    """Assign each speaker to one part.

    The part depends only on `seed`, the speaker's name and the fractions, so it stays the same when recordings and
    speakers are added later. The sizes of the parts therefore only approximate the fractions.

    Raises `ConfigError` if the fractions are not positive or do not add up to 1, and `CorpusError` if a part is empty.
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
    """Return the share of broken utterances when `usable` ones are left; 0 if there are none at all."""
    broken = sum(fault.utterances for fault in faults)
    return broken / (broken + usable) if broken else 0.0


def require_few_broken(faults: Sequence[Fault], usable: int, max_broken: float) -> None:
    """Raise `CorpusError` if the share of broken utterances is above `max_broken`."""
    share = broken_share(faults, usable)
    if share > max_broken:
        raise CorpusError(
            f"{share:.2%} of the utterances are broken or left out, more than {max_broken:.2%}; the first: "
            f"{faults[0]}; fix them, or allow more with --max-broken {min(1.0, share * 1.01):.2g}"
        )


def describe(corpus: Corpus, max_faults: int = 10) -> str:
    """Return a summary of a corpus in lines for people, with at most `max_faults` faults."""
    counts = [len(group) for group in corpus.speakers.values()] or [0]
    rates = Counter(each.sample_rate for each in corpus.utterances if each.sample_rate)
    genders = Counter(corpus.genders.get(speaker, "unknown") for speaker in corpus.speakers)
    layouts = Counter(corpus.layouts)
    lines = [
        f"layout        {', '.join(f'{name} × {n}' if n > 1 else name for name, n in layouts.items())}",
        f"speakers      {len(corpus.speakers)} ({', '.join(f'{n} {kind}' for kind, n in sorted(genders.items()))})",
        f"utterances    {len(corpus.utterances)}",
        f"hours         {corpus.seconds / 3600:.2f}",
        f"sample rates  {', '.join(f'{rate} Hz × {n}' for rate, n in sorted(rates.items())) or 'not inspected'}",
        f"per speaker   {min(counts)} to {max(counts)} utterances, median {statistics.median(counts):g}",
    ]
    if corpus.merged_speakers:
        lines.append(f"merged        {corpus.merged_speakers} speakers of several sources, each counted as one person")
    if corpus.shared_names:
        lines.append(f"shared names  {corpus.shared_names} utterance names are used by several speakers; ids differ")
    lines += [f"ignored       {n} files {reason}, for example {example}" for n, reason, example in corpus.ignored]
    lines.append(f"left out      {len(corpus.faults)} ({corpus.broken_share:.2%} of the utterances)")
    lines += [f"  {fault}" for fault in corpus.faults[:max_faults]]
    if len(corpus.faults) > max_faults:
        lines.append(f"  … and {len(corpus.faults) - max_faults} more")
    return "\n".join(lines)


def scan(root: str | Path, pattern: str | None = None) -> list[Speaker]:
    """Return the speakers of one corpus with their files, for mixtures: `list_corpus` in its shortest form."""
    return files_by_speaker(list_corpus([root], pattern=pattern))


def files_by_speaker(corpus: Corpus) -> list[Speaker]:
    """Return the speakers sorted by name, each with their files sorted by path and, in a tar shard, by name."""
    speakers = []
    for name, utterances in corpus.speakers.items():
        recordings = sorted((each.recording for each in utterances), key=lambda each: (each.path, each.name))
        files = tuple(each.path if each.size is None else each for each in recordings)
        speakers.append(Speaker(name, files))
    return speakers


class _Inspector:
    """The work of one process: return utterances with their lengths and sample rates, or their faults."""

    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def __call__(self, utterances: Sequence[Utterance]) -> list[Utterance | Fault]:
        return [self._inspect(utterance) for utterance in utterances]

    def _inspect(self, utterance: Utterance) -> Utterance | Fault:
        try:
            length, rate = _decode(utterance.recording) if self.decode else utterance.recording.probe()
        except AudioError as error:
            return utterance.recording.fault(error)
        return dataclasses.replace(utterance, seconds=length / rate, sample_rate=rate)


def _decode(recording: Recording) -> tuple[int, int]:
    samples, rate = recording.read()
    require_not_silent(samples, recording.name)
    return len(samples), rate


def _without_duplicates(listings: Iterable[Listing]) -> tuple[list[Utterance], list[Fault]]:
    """Return the sorted utterances with each id once, and all faults, including one per duplicate."""
    first: dict[str, Utterance] = {}
    faults: list[Fault] = []
    for listing in listings:
        faults += listing.faults
        for utterance in listing.utterances:
            earlier = first.setdefault(utterance.id, utterance)
            if earlier is not utterance:
                reason = f"duplicate of the utterance {utterance.id}, already found as {earlier.recording.name}"
                faults.append(Fault(utterance.recording.name, reason))
    return sorted(first.values(), key=lambda utterance: (utterance.speaker, utterance.id)), faults


def _with_gender(utterance: Utterance, genders: Mapping[str, str]) -> Utterance:
    gender = genders.get(utterance.speaker, utterance.gender)
    return utterance if gender == utterance.gender else dataclasses.replace(utterance, gender=gender)


def _ignored(listings: Sequence[Listing]) -> tuple[tuple[int, str, str], ...]:
    total = sum((listing.ignored for listing in listings), Counter[str]())
    examples = {reason: name for listing in reversed(listings) for reason, name in listing.examples.items()}
    return tuple((count, reason, examples[reason]) for reason, count in sorted(total.items()))


def _shared_names(utterances: Iterable[Utterance]) -> int:
    names = Counter(utterance.id.removeprefix(f"{utterance.speaker}/") for utterance in utterances)
    return sum(count > 1 for count in names.values())
