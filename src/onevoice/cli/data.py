"""The verbs that prepare data: `mix`, and `corpus` with `scan`, `pack`, `rooms` and `verify`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from onevoice.errors import ConfigError

GROUP = Group("Prepare data", sort_key=3)
"""The heading of these verbs in the help."""
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]


def mix(
    *corpus_and_out: Path,
    protocol: Path | None = None,
    count: int = 5000,
    snr: Annotated[list[float], Parameter(consume_multiple=True)] = [0.0, 5.0],  # noqa: B006 (cyclopts shows it in the help; never changed)
    test: bool = False,
    seed: int = 42,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    shard: str | None = None,
    sample_rate: int = 16_000,
    segment_seconds: float = 3.0,
    vad_db: float = 20.0,
    trim_db: float | None = None,
    layout: str | None = None,
    pattern: str | None = None,
) -> None:
    """Make mixtures with their targets and enrollments: onevoice mix CORPUS... OUT.

    A CORPUS is anything that `onevoice corpus pack` reads: a folder with one folder per speaker, a known corpus, a .tar
    or a manifest. OUT gets NAME-mixed.wav, NAME-target.wav, NAME-ref.wav and manifest.jsonl. If interrupted, run it
    again with the same options to resume. The same seed gives the same bytes for any number of workers.

    Args:
        corpus_and_out: One or more corpora and, last, the folder to write; with --protocol, only the folder to write.
        protocol: Write the trials of a data set (LibriMix, WSJ0-2mix, …) instead. A JSON file; see docs/data.md.
        count: How many pairs of utterances to mix. A pair is cut into several training mixtures.
        snr: Levels of the target above the interferer in dB. Each trial draws one of them.
        test: Keep full lengths. By default, silence is cut and the rest is cut into equal segments.
        seed: The seed of all random draws.
        workers: Number of processes; by default one per core.
        engine: Where processes run: local, or ray for a Ray cluster, whose machines must share the file system of OUT
            (needs onevoice[ray]).
        address: The address of the cluster, or auto; by default RAY_ADDRESS, or a new one on this machine.
        shard: Make only the part I of N equal parts, as I/N: for job arrays. The same command without it then joins the
            parts.
        sample_rate: Sample rate of the written files in Hz.
        segment_seconds: Length of a training mixture in seconds.
        vad_db: In training mixtures, cut frames this many dB below the loudest frame.
        trim_db: Cut silence at both ends of all three files: frames this many dB below the loudest. Off by default.
        layout: The layout of the corpora, if it is not recognized; see `onevoice corpus pack --help`.
        pattern: Use only files whose name matches, for example "*-norm.wav".
    """
    from onevoice.cluster import choose_workers
    from onevoice.files import parse_shard

    chosen, part = choose_workers(engine, address, workers, os.cpu_count() or 1), parse_shard(shard)
    if protocol is not None:
        if len(corpus_and_out) != 1:
            raise ConfigError("mix --protocol FILE.json takes one folder, the one to write: the file names the rest")
        from onevoice.trials import export_trials, load_trials_config

        print(export_trials(load_trials_config(protocol), corpus_and_out[0], workers=chosen, shard=part))
        _say_how_to_join(part)
        return
    if len(corpus_and_out) < 2:
        raise ConfigError("mix takes one or more corpora and, last, the folder to write: onevoice mix CORPUS... OUT")
    from onevoice.corpus.listing import files_by_speaker, list_corpus
    from onevoice.mixing.generator import MixtureGenerator

    *corpora, out = corpus_and_out
    for corpus in corpora:
        if out.resolve().is_relative_to(corpus.resolve()):
            raise ConfigError(
                f"{out}: is inside the corpus {corpus}, where it would count as a speaker; name another folder"
            )
    listed = list_corpus(corpora, layout=layout, pattern=pattern)
    if listed.faults:
        print(f"left out: {len(listed.faults)} files, the first: {listed.faults[0]}", file=sys.stderr)
    generator = MixtureGenerator(
        files_by_speaker(listed), out, nfiles=count, test=test, randomState=seed, sample_rate=sample_rate
    )
    summary = generator.generate_mixes(
        snr_levels=snr,
        num_workers=chosen,
        trim_db=trim_db,
        vad_db=vad_db,
        audioLen=segment_seconds,
        shard=part,
    )
    print(summary)
    _say_how_to_join(part)


def _say_how_to_join(shard: Any) -> None:
    if shard is not None:
        print(f"this was shard {shard}; when all are done, run the same command without --shard")


corpus_app = App(
    name="corpus",
    group=GROUP,
    help="Inspect corpora of speech by speaker, and pack them for training.",
    default_parameter=Parameter(negative=()),
)


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
    """Print what corpora contain: speakers, hours, sample rates, gender, and broken files.

    A source is a folder in the layout of LibriSpeech, VCTK, VoxCeleb or AISHELL; any folder of speaker folders; a .tar
    of SPEAKER/UTTERANCE.EXTENSION or a folder of such files; or a manifest, which is a CSV or JSONL file with the
    columns path and speaker and, optionally, utterance and gender. Several sources count as one corpus.

    Args:
        sources: Folders, tar files and manifests.
        layout: The layout, if it is not recognized: librispeech, vctk, voxceleb, aishell, folder, tar, manifest, or
            flat (no speakers).
        pattern: Use only files whose name matches, for example "*-norm.wav".
        speakers: A CSV or JSONL table with the columns speaker and gender. It overrides what the corpus says.
        decode: Decode every file instead of reading headers. It finds all damage, NaN and silence, and takes minutes
            per 10 hours of speech.
        max_broken: Fail with status 2 if a larger share of the files is broken.
        show: How many broken files to name.
        workers: Number of processes; by default one per core.
    """
    from onevoice.corpus.listing import describe, scan_corpus

    corpus = scan_corpus(
        _some(sources),
        layout=layout,
        pattern=pattern,
        genders=_genders(speakers),
        decode=decode,
        workers=workers or os.cpu_count() or 1,
    )
    print(describe(corpus, show), flush=True)
    corpus.require_usable(max_broken)


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
    engine: str = "local",
    address: str | None = None,
    shard: str | None = None,
) -> None:
    """Decode corpora once into a packed corpus, from which training reads any crop in microseconds.

    The same sources give the same bytes for any number of workers. One hour takes 115 MB at 16 kHz. Files are converted
    to one sample rate, their mean is removed, and broken files are named and left out.

    Args:
        sources_and_out: The sources, as for `scan`, and last the folder to write. Tar shards may be addresses such as
            s3://bucket/shard-000.tar (needs onevoice[remote]).
        split: Parts and their shares of the speakers, as "train=0.9 validation=0.1". Each part becomes a pack,
            OUT/PART.
        seed: The seed of the split. A speaker stays in its part when more speakers are added later.
        sample_rate: Sample rate of the pack in Hz.
        speeds: Also pack everything at these speeds, as additional speakers; for example 0.9 1.1.
        keep_mean: Keep the mean of each recording; use it for room impulse responses.
        layout: The layout, if it is not recognized: librispeech, vctk, voxceleb, aishell, folder, tar, manifest, or
            flat (no speakers).
        pattern: Use only files whose name matches, for example "*-norm.wav".
        speakers: A CSV or JSONL table with the columns speaker and gender. It overrides what the corpus says.
        max_broken: Fail with status 2 if a larger share of the files is broken.
        verify: Read everything back and compare the checksums.
        workers: Number of processes; by default one per core.
        engine: Where processes run: local, or ray for a Ray cluster, whose machines must read the sources at the same
            place (needs onevoice[ray]).
        address: The address of the cluster, or auto; by default RAY_ADDRESS, or a new one on this machine.
        shard: I/N packs only every N-th utterance, beginning with the I-th; the same command without it does the rest.
    """
    from onevoice.cluster import choose_workers
    from onevoice.corpus.listing import list_corpus, split_speakers
    from onevoice.corpus.packing import pack_corpus, pack_shard
    from onevoice.files import parse_shard

    own = parse_shard(shard)
    chosen = choose_workers(engine, address, workers, os.cpu_count() or 1)
    *sources, out = _some(sources_and_out)
    if not sources:
        raise ConfigError(f"{out}: name the sources and then the folder to write: pack SOURCE... OUT")
    corpus = list_corpus(sources, layout=layout, pattern=pattern, genders=_genders(speakers))
    for fault in corpus.faults:
        print(f"left out: {fault}", file=sys.stderr)
    corpus.require_usable(max_broken)
    parts = {out: corpus}
    if split:
        members = split_speakers(corpus.speakers, _fractions(split), seed)
        parts = {out / part: corpus.subset(names) for part, names in members.items()}
    settings: dict[str, Any] = {
        "sample_rate": sample_rate,
        "workers": chosen,
        "speeds": speeds or (),
        "keep_mean": keep_mean,
        "max_broken": max_broken,
    }
    for folder, part in parts.items():
        if own is not None:
            done = pack_shard(part, folder, own, **settings)
            print(f"{done}: packed; when all shards are done, run the same command without --shard", flush=True)
            continue
        packed = pack_corpus(part, folder, **settings)
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
    t60: tuple[float, float] = (0.15, 0.6),
    workers: int | None = None,
) -> None:
    """Simulate rooms for training with reverberation: writes OUT/roomNNNN/talkerNN.wav.

    Pack the result with `onevoice corpus pack OUT PACK --keep-mean`.

    Args:
        out: The folder to write.
        count: Number of rooms.
        seed: The seed of all random draws.
        sample_rate: Sample rate in Hz.
        talkers: Impulse responses per room. A mixture takes all its voices from one room.
        t60: Shortest and longest reverberation time in seconds.
        workers: Number of processes; by default one per core.
    """
    from onevoice.config import from_dict
    from onevoice.mixing.rooms import RoomConfig, simulate_rooms

    if count < 1:
        raise ConfigError(f"count: {count} rooms are too few; ask for at least 1")
    options = {"sample_rate": sample_rate, "talkers": talkers, "reverberation_seconds": list(t60)}
    config = from_dict(RoomConfig, options, name="options")
    simulate_rooms(config, out, count, seed, workers or os.cpu_count() or 1)
    print(f"{count} rooms in {out}; pack them with: onevoice corpus pack {out} PACK --keep-mean")


@corpus_app.command
def verify(*packs: Path) -> None:
    """Compare packs with their checksums, and print what they contain.

    Args:
        packs: Folders that `pack` has written.
    """
    from onevoice.corpus.pack import PackedCorpus

    for path in _some(packs):
        packed = PackedCorpus.open(path)
        packed.verify()
        print(packed.summary(), flush=True)


def _some(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    if not paths:
        raise ConfigError("name a corpus: a folder, a .tar file, or a manifest in .csv or .jsonl")
    return paths


def _genders(table: Path | None) -> dict[str, str]:
    from onevoice.corpus.layouts import read_genders

    return {} if table is None else read_genders(table)


def _fractions(split: list[str]) -> dict[str, float]:
    """Return the share of each part from words such as `train=0.9`; raise `ConfigError` for any other form."""
    fractions: dict[str, float] = {}
    for word in (word for text in split for word in text.split()):
        part, _, share = word.partition("=")
        if not part.replace("-", "").replace("_", "").isalnum() or part in fractions:
            raise ConfigError(f"--split {word}: give each part once, as NAME=SHARE: train=0.9 validation=0.1")
        try:
            fractions[part] = float(share)
        except ValueError:
            raise ConfigError(f"--split {word}: {share!r} is not a number; give train=0.9 validation=0.1") from None
    return fractions
