"""The verbs that use weights: `extract`, `demo`, `info` and `convert`."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from onevoice.errors import AudioError, CheckpointError, ConfigError

GROUP = Group("Use weights", sort_key=1)
"""The heading of these verbs in the help."""
Pretrained = Annotated[str | None, Parameter(name=["--pretrained", "--checkpoint"])]
"""The weights to use; None for the default ones."""
PIPE = "./-"
"""How `-`, standard input or output, gets past the command-line library, which takes a lone hyphen for an option."""
EvalConfigFile = Annotated[Path | None, Parameter(name=["--config", "--c", "-c"])]


def extract(
    mixture: str | None = None,
    enrollment: str | None = None,
    output: str | None = None,
    *more: str,
    voice: list[str] | None = None,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    jobs_file: Annotated[str | None, Parameter(name=["--list", "--jobs-file"])] = None,
    results: Path | None = None,
    everyone: Annotated[str | None, Parameter(name="--all")] = None,
    residual: str | None = None,
    channel: str = "mean",
    absent: str = "keep",
    timeline: str | None = None,
    report: str | None = None,
    force: bool = False,
    jobs: Annotated[int | None, Parameter(name=["--jobs", "-j"])] = None,
    engine: str = "local",
    address: str | None = None,
    shard: str | None = None,
    pretrained: Pretrained = None,
    precision: str = "auto",
    config: EvalConfigFile = None,
    device: str = "auto",
) -> None:
    """Extract the voice of ENROLLMENT from MIXTURE and write it to OUTPUT.

    OUTPUT is mono and has the sample rate, length and level of MIXTURE. With --voice, all names are mixtures:
    onevoice extract MIXTURE... --voice ENROLLMENT --out FOLDER. A stopped extraction of a long recording resumes with
    the same command. Names may be addresses such as s3://bucket/name (needs onevoice[remote]).

    Args:
        mixture: The recording of several people, of any length, rate and format, or a glob pattern; - is standard
            input.
        enrollment: Another recording, of the wanted person alone: 3 s or more is best, 0.5 s the minimum.
        output: The file to write. Its ending sets the format; .wav is 32-bit float; - is standard output.
        more: With --voice, more mixtures.
        voice: The enrollment, instead of the second name: a FILE, a stretch of one (FILE@1:20-1:31), a person whom
            onevoice voices lists (FILE#2), or a saved voice (FILE.voice). Several recordings of the person: repeat it.
        out: With --voice, the file to write, or the folder, which gets NAME.wav for each mixture.
        jobs_file: A file of lines {"mixture": …, "voice": …, "output": …, "residual": …}, instead of names.
        results: With --list, also write a row per job to this .jsonl file as it ends; a stopped command then resumes.
        everyone: Without any enrollment, extract every person who is found in MIXTURE, into this folder.
        residual: Also write what is left, MIXTURE minus OUTPUT, to this file; with a folder for --out, a folder.
        channel: Which channel of MIXTURE to use: 1, 2, …, their mean, or each, which keeps all channels apart.
        absent: What to do where the voice is not heard: keep the output, mute it, or turn it down by a number of dB.
        timeline: Also write when the voice is heard: .csv, .rttm, or .txt for Audacity. For one mixture.
        report: Also write an HTML page with players, spectrograms and the presence of the voice. For one mixture.
        force: Replace outputs that exist.
        jobs: Processes to work in at once; by default 1, and on a cluster one per core or GPU. On a processor, each
            takes one recording at a time, and on a GPU, up to 32.
        engine: Where processes run: local, or ray for a Ray cluster (needs onevoice[ray]), where --device cuda gives
            each process a GPU.
        address: The address of the cluster, or auto; by default RAY_ADDRESS, or a new one on this machine.
        shard: With --list, do only the part I of N equal parts, as I/N: for job arrays.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        precision: Of the matrix products: float32 or bfloat16; auto is bfloat16 if the processor computes in it.
        config: An eval config whose `model` section describes a .pth checkpoint; other checkpoints need none.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.cluster import choose_workers
    from onevoice.extraction.jobs import Settings
    from onevoice.extraction.request import parse_absent, parse_channel
    from onevoice.files import parse_shard

    settings = Settings(parse_channel(channel), force, parse_absent(absent))
    workers = choose_workers(engine, address, jobs, 1, "jobs", gpus=int(device.startswith("cuda")))
    if jobs_file is None and (results is not None or shard is not None):
        raise ConfigError("--results, --shard: are for a job list (--list)")
    names = [name for name in map(_plain, (mixture, enrollment, output, *more)) if name is not None]
    voices = tuple("-" if each == PIPE else each for each in voice or ())
    if everyone is not None:
        todo = _jobs_for_everyone(names, everyone, bool(voices or out or jobs_file or residual))
    else:
        todo = _jobs_of(names, voices, _plain(out), jobs_file, _plain(residual))
    if timeline is not None or report is not None:
        if len(todo) != 1 or jobs_file is not None:
            raise ConfigError("--timeline and --report: are for one mixture; name them in a job list (--list)")
        todo = [replace(todo[0], timeline=timeline, report=report)]
    load = functools.partial(_load, pretrained, config, device, precision)
    _do_jobs(todo, settings, load, device, workers, results, parse_shard(shard))


def _do_jobs(
    todo: list[Any], settings: Any, load: Any, device: str, workers: Any, results: Path | None, shard: Any
) -> None:
    """Do the jobs, or those of one shard that have no row in `results` yet, and print what became of them."""
    from onevoice.extraction.job_results import JobResults
    from onevoice.extraction.jobs import check_jobs, jobs_together, run_jobs

    with contextlib.ExitStack() as stack:
        append = None
        if results is not None:
            kept = JobResults(results, todo, shard)
            todo, settings = kept.left, replace(settings, force=settings.force or kept.is_resumed)
            print(f"{kept.path}: {kept.done} jobs are done, {len(todo)} are left")
        elif shard is not None:
            todo = shard.of(todo)
        check_jobs(todo, settings)
        if results is not None:
            append = stack.enter_context(kept.appending())
        progress, together = stack.enter_context(_progress()), jobs_together(device, workers, len(todo))
        found = run_jobs(todo, load, settings, workers, progress, together)
        _print_results(_recorded(found, append), len(todo), any(job.output == "-" for job in todo))


def _recorded(results: Iterable[tuple[Any, Any]], append: Callable[[Any, Any], None] | None) -> Iterator[Any]:
    """Yield what became of each job, after its row is written."""
    for job, result in results:
        if append is not None:
            append(job, result)
        yield result


def _plain(name: str | None) -> str | None:
    """Return the name as the user wrote it."""
    return "-" if name == PIPE else name


def _jobs_of(
    names: list[str], voices: tuple[str, ...], out: str | None, jobs_file: str | None, residual: str | None
) -> list[Any]:
    """Return the jobs that a command line asks for. Raises `ConfigError`."""
    from onevoice.extraction.jobs import Job, jobs_for, read_jobs

    see = "see onevoice extract --help"
    if jobs_file is not None:
        if names or voices or out is not None or residual is not None:
            raise ConfigError("--list: names mixtures, voices and outputs itself; leave the other names out")
        return read_jobs(jobs_file)
    if voices:
        if not names:
            raise ConfigError(f"MIXTURE: is missing; {see}")
        if out is None:
            raise ConfigError(f"--out: is missing; name the file or the folder to write; {see}")
        return jobs_for(names, voices[0] if len(voices) == 1 else voices, out, residual)
    if out is not None and len(names) == 2:
        names = [*names, out]
    elif out is not None:
        raise ConfigError(f"--out: needs --voice, or a mixture and an enrollment before it; {see}")
    if len(names) > 3:
        raise ConfigError(f"{' '.join(names[3:])}: too many arguments; {see}")
    if len(names) < 3:
        raise ConfigError(f"{('MIXTURE', 'ENROLLMENT', 'OUTPUT')[len(names)]}: is missing; {see}")
    return [Job(names[0], names[1], names[2], residual)]


def _jobs_for_everyone(names: list[str], folder: str, has_more: bool) -> list[Any]:
    """Return a job for each person who is found in a recording. Raises `ConfigError`."""
    from onevoice.extraction.enrollment import find_in_file
    from onevoice.extraction.jobs import Job

    if len(names) != 1 or names[0] == "-" or has_more:
        raise ConfigError("--all: needs one mixture, from a file, and no other names; see onevoice extract --help")
    found = find_in_file(names[0])
    if not found:
        raise AudioError(f"{names[0]}: no speech was found in it")
    return [
        Job(names[0], f"{names[0]}#{each.number}", str(Path(folder) / f"{Path(names[0]).stem}-{each.number}.wav"))
        for each in found
    ]


def _load(pretrained: str | None, config: Path | None, device: str, precision: str) -> Any:
    """Load the network in the process that runs it."""
    from onevoice.extraction.extractor import load
    from onevoice.processes import keep_freed_memory

    keep_freed_memory()
    return load(pretrained, _model_of(config), device, precision)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """Show how much of a recording is done and the remaining time, if standard error is a terminal."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=1.0, disable=None, leave=False, bar_format=form) as bar:

        def report(share: float) -> None:
            if share < bar.n:
                bar.reset()
            bar.update(share - bar.n)

        yield report


def _print_results(results: Iterable[Any], count: int, to_error: bool) -> None:
    """Print a line per recording and, for several, one about all of them. Raises the error of a failed one at the end.

    The lines go to standard error if the sound goes to standard output.
    """
    from onevoice.extraction.jobs import Failure

    out, done, failed = sys.stderr if to_error else sys.stdout, [], []
    for result in results:
        if isinstance(result, Failure):
            failed.append(result.message)
            if count > 1:
                print(f"onevoice: failed: {result.message}", file=sys.stderr)
        else:
            done.append(result)
            print(result.text(), file=out, flush=True)
    if count > 1:
        seconds, elapsed = (sum(getattr(each, key) for each in done) for key in ("seconds", "elapsed_seconds"))
        print(f"{len(done)} of {count} recordings, {seconds:.1f} s of sound in {elapsed:.1f} s", file=out)
    if failed:
        raise AudioError(failed[0] if count == 1 else f"{len(failed)} of {count} recordings failed")


def _model_of(config: Path | None) -> Any:
    """Return the `model` section of an eval config; None without a config."""
    if config is None:
        return None
    return load_eval_config(config).model


def demo(
    *,
    out: Annotated[Path, Parameter(name=["--out", "--output", "--o", "-o"])] = Path("onevoice-demo"),
    force: bool = False,
    pretrained: Pretrained = None,
    device: str = "auto",
) -> None:
    """Extract a voice from the sample recordings that come with the package, and measure the result.

    Args:
        out: The folder to write; it gets mixture.wav, enrollment.wav, voice.wav and residual.wav.
        force: Replace these files if they exist.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.evaluation.demo import OUTPUTS, run
    from onevoice.extraction.extractor import load
    from onevoice.streams import check_outputs

    check_outputs([out / name for name in OUTPUTS], [], force)
    print(run(load(pretrained, device=device), out).text())


def info(checkpoint: str | None = None) -> None:
    """List the published weights, or print the card of a checkpoint: its model, config, speakers and facts.

    Args:
        checkpoint: A published NAME, the PATH of a checkpoint, or hf://OWNER/REPO. Leave it out to get the list.
    """
    from onevoice.extraction.checkpoint import read_registry, resolve

    if checkpoint is None:
        registry = read_registry()
        lines = [each.line(name) + " (default)" * (name == registry.default) for name, each in registry.weights.items()]
        print("\n".join(lines) or "no weights come with this installation")
        return
    from onevoice.extraction.checkpoint import load_weights

    path = resolve(checkpoint)
    state, card = load_weights(path)
    if card is None:
        raise CheckpointError(f"{path}: holds {len(state)} tensors, but does not say which model they belong to")
    print(json.dumps({**json.loads(card.to_json()), "weights": sum(v.numel() for v in state.values())}, indent=2))


def convert(source: str, output: Path | None = None, *, config: EvalConfigFile = None) -> None:
    """Convert a checkpoint (.pth) or a config (.json) of the original system: onevoice convert SOURCE [OUTPUT].

    Args:
        source: The checkpoint, or the config for training or evaluation.
        output: The .safetensors or .json file to write. A config is printed by default.
        config: An eval config whose `model` section describes a .pth checkpoint of another program.
    """
    from onevoice.extraction.checkpoint import Card, load_model, provenance, resolve, save_checkpoint
    from onevoice.files import require_writable

    suffix = ".json" if source.lower().endswith(".json") else ".safetensors"
    if output is None and suffix == ".safetensors":
        raise ConfigError("OUTPUT: is missing; name the .safetensors file to write")
    if output is not None:
        if output.suffix != suffix or output.absolute() == Path(source).absolute():
            raise ConfigError(f"{output}: must be another file than {source}, and end in {suffix}")
        require_writable(output)
    if suffix == ".json":
        _convert_config(Path(source), output)
    elif output is not None:
        path = resolve(source)
        model, card = load_model(path, _model_of(config))
        facts = {**card.facts, "converted_from": path.name, **provenance()}
        save_checkpoint(output, model.state_dict(), Card(card.config, card.speakers, facts))
        print(output)


def _convert_config(source: Path, output: Path | None) -> None:
    """Write or print the translation of a config; a line lists what has no counterpart."""
    from onevoice.config import from_dict, read_config
    from onevoice.evaluation.run import EvaluationConfig
    from onevoice.files import atomic_write, to_json
    from onevoice.training.experiment import Experiment
    from onevoice.training.original import is_for_evaluation, is_original, translate_evaluation, translate_experiment

    values = read_config(source)
    if not is_original(values):
        raise ConfigError(f"{source}: not a config of the original system, so there is nothing to convert")
    if is_for_evaluation(values):
        kind, translation = "eval", translate_evaluation(values)
        from_dict(EvaluationConfig, translation.values, name=str(source))
    else:
        kind, translation = "train", translate_experiment(values)
        from_dict(Experiment, translation.values, name=str(source))
    text = to_json(translation.values)
    if output is None:
        print(text.decode(), end="")
    else:
        atomic_write(output, text)
    print(f"{output or source}: a config for onevoice {kind}; {translation.describe()}", file=sys.stderr)


def load_eval_config(path: Path) -> Any:
    """Read an eval config, or take one from a training config or from a config of the original system."""
    from onevoice.config import from_dict, read_config, to_dict
    from onevoice.evaluation.run import EvaluationConfig
    from onevoice.training.experiment import Experiment
    from onevoice.training.original import is_original, translate_evaluation

    values = read_config(path)
    if is_original(values):
        translation = translate_evaluation(values)
        print(f"{path}: translated from the original system; {translation.describe()}", file=sys.stderr)
        values = translation.values
    elif isinstance(values.get("data"), dict) and "validation" in values["data"]:
        experiment = from_dict(Experiment, values, name=str(path))
        print(f"{path}: a training config; its validation trials are the default", file=sys.stderr)
        values = {
            "data": to_dict(experiment.data.validation),
            "batch_size": experiment.data.validation_batch_size,
            "model": to_dict(experiment.model),
            "device": experiment.training.device,
        }
    return from_dict(EvaluationConfig, values, name=str(path))
