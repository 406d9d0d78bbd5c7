"""The verbs of `onevoice corpus`: look at a corpus, pack it, check a pack."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

corpus_app = App(
    name="corpus",
    help="Look at corpora of speech by speaker, and pack them for training.",
    default_parameter=Parameter(negative=()),
)
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]


@corpus_app.command
def scan(
    *sources: Path,
    layout: str | None = None,
    pattern: str | None = None,
    speakers: Path | None = None,
    decode: bool = False,
    max_broken: float = 0.01,
    show: int = 10,
    workers: int | None = None,
) -> None:
    """Print what corpora hold: speakers, hours, sample rates, gender, and what is broken.

    A source is a folder in the layout of LibriSpeech, VCTK, VoxCeleb or AISHELL, any folder of speaker folders, a .tar
    of SPEAKER/UTTERANCE.ENDING or a folder of such, or a manifest: CSV or JSONL with the columns path, speaker and,
    if you like, utterance and gender. Several are taken together.

    Args:
        sources: Folders, tar shards and manifests.
        layout: Force librispeech, vctk, voxceleb, aishell, folder, tar, manifest or flat (no speakers).
        pattern: Use only files whose name matches, e.g. "*-norm.wav".
        speakers: A CSV or JSONL table with the columns speaker and gender, which goes before what the corpus says.
        decode: Decode everything instead of reading headers; finds all damage, NaN and silence, in minutes per 10 h.
        max_broken: Share of broken files from which on the command fails with status 2.
        show: How many broken files are named.
        workers: Processes; one per core unless given.
    """
    from onevoice.corpus.listing import report, scan_corpus

    corpus = scan_corpus(
        _some(sources),
        layout=layout,
        pattern=pattern,
        genders=_genders(speakers),
        decode=decode,
        workers=workers or os.cpu_count() or 1,
    )
    print(report(corpus, show), flush=True)
    corpus.require(max_broken)


@corpus_app.command
def pack(
    *sources_and_out: Path,
    split: Words = None,
    seed: int = 0,
    sample_rate: int = 16_000,
    speeds: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    keep_mean: bool = False,
    layout: str | None = None,
    pattern: str | None = None,
    speakers: Path | None = None,
    max_broken: float = 0.01,
    verify: bool = False,
    workers: int | None = None,
) -> None:
    """Decode corpora once into a packed corpus, from which training reads any crop in microseconds.

    Interrupted and started again it goes on; the same sources give the same bytes for any number of workers. One hour
    takes 115 MB at 16 kHz. Files of other rates are converted, means removed, broken files left out and named.

    Args:
        sources_and_out: The sources, as for `scan`, and last the folder to write.
        split: Parts and their shares of the speakers, e.g. "train=0.9 validation=0.1": a pack for each in OUT/PART.
        seed: What the split depends on; nobody changes sides when speakers are added later.
        sample_rate: Rate of the pack in Hz.
        speeds: Pack everything once more at these speeds, as speakers of their own, e.g. 0.9 1.1.
        keep_mean: Do not remove the mean of each recording; for room responses.
        layout: Force librispeech, vctk, voxceleb, aishell, folder, tar, manifest or flat (no speakers).
        pattern: Use only files whose name matches, e.g. "*-norm.wav".
        speakers: A CSV or JSONL table with the columns speaker and gender, which goes before what the corpus says.
        max_broken: Share of broken files from which on the command gives up.
        verify: Read everything back and compare the checksums.
        workers: Processes; one per core unless given.
    """
    from onevoice.corpus.listing import list_corpus, split_speakers
    from onevoice.corpus.packing import pack_corpus
    from onevoice.errors import CorpusError

    *sources, out = _some(sources_and_out)
    if not sources:
        raise CorpusError(f"{out}: name the sources and then the folder to write: pack SOURCE... OUT")
    corpus = list_corpus(sources, layout=layout, pattern=pattern, genders=_genders(speakers))
    for fault in corpus.faults:
        print(f"left out: {fault}", file=sys.stderr)
    corpus.require(max_broken)
    parts = {out: corpus}
    if split:
        members = split_speakers(corpus.speakers, _fractions(split), seed)
        parts = {out / part: corpus.of(names) for part, names in members.items()}
    for folder, part in parts.items():
        packed = pack_corpus(
            part,
            folder,
            sample_rate=sample_rate,
            workers=workers or os.cpu_count() or 1,
            speeds=speeds or (),
            keep_mean=keep_mean,
            max_broken=max_broken,
        )
        if verify:
            packed.verify()
        print(packed.summary(), flush=True)


@corpus_app.command
def rooms(
    out: Path,
    *,
    count: int = 200,
    seed: int = 0,
    sample_rate: int = 16_000,
    talkers: int = 4,
    t60: Annotated[tuple[float, float], Parameter(help="Shortest and longest reverberation time in seconds.")] = (
        0.15,
        0.6,
    ),
    workers: int | None = None,
) -> None:
    """Simulate rooms: OUT/roomNNNN/talkerNN.wav, to be packed with --keep-mean for training with reverberation.

    Args:
        out: The folder to write.
        count: How many rooms.
        seed: What all draws depend on.
        sample_rate: Rate in Hz.
        talkers: Responses per room; a mixture takes its voices from one room.
        workers: Processes; one per core unless given.
    """
    from onevoice.config import from_dict
    from onevoice.errors import ConfigError
    from onevoice.mixing.rooms import RoomLaw, simulate_rooms

    if count < 1:
        raise ConfigError(f"count: {count} rooms are too few; ask for at least 1")
    options = {"sample_rate": sample_rate, "talkers": talkers, "reverberation_seconds": list(t60)}
    law = from_dict(RoomLaw, options, name="options")
    simulate_rooms(law, out, count, seed, workers or os.cpu_count() or 1)
    print(f"{count} rooms in {out}; pack them with: onevoice corpus pack {out} PACK --keep-mean")


@corpus_app.command
def verify(*packs: Path) -> None:
    """Compare packs with their checksums, and print what they hold.

    Args:
        packs: Folders that `pack` has written.
    """
    from onevoice.corpus.pack import PackedCorpus

    for path in _some(packs):
        packed = PackedCorpus.open(path)
        packed.verify()
        print(packed.summary(), flush=True)


def _some(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    from onevoice.errors import CorpusError

    if not paths:
        raise CorpusError("name a corpus: a folder, a .tar, or a manifest in .csv or .jsonl")
    return paths


def _genders(table: Path | None) -> dict[str, str]:
    from onevoice.corpus.layouts import speaker_table

    return {} if table is None else speaker_table(table)


def _fractions(split: list[str]) -> dict[str, float]:
    """Return `train=0.9 validation=0.1` as fractions by part; raise `ConfigError` when it is not like that."""
    from onevoice.errors import ConfigError

    fractions: dict[str, float] = {}
    for word in (word for text in split for word in text.split()):
        part, _, share = word.partition("=")
        if not part.replace("-", "").replace("_", "").isalnum() or part in fractions:
            raise ConfigError(f"--split {word}: write each part once, as NAME=SHARE: train=0.9 validation=0.1")
        try:
            fractions[part] = float(share)
        except ValueError:
            raise ConfigError(f"--split {word}: {share!r} is not a number; write train=0.9 validation=0.1") from None
    return fractions
