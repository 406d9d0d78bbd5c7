"""The verbs about voices: `enroll` and `voices`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from onevoice.cli.using import Pretrained


def enroll(
    *recordings: str,
    out: Annotated[Path, Parameter(name=["--out", "--output", "-o"])],
    force: bool = False,
    pretrained: Pretrained = None,
    device: str = "auto",
) -> None:
    """Save the voice of a person for onevoice extract --voice, and print a check-up of the recordings.

    Of three or more recordings, those that sound like another person are left out.

    Args:
        recordings: Recordings of the person alone: FILE, a stretch of one (FILE@1:20-1:31), or a person whom onevoice
            voices lists (FILE#2).
        out: The file to write, NAME.voice. Only the weights that made it can use it.
        force: Replace the file if it exists.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    from onevoice.errors import ConfigError
    from onevoice.extraction.enrollment import check_voice, enroll_files
    from onevoice.extraction.extractor import load
    from onevoice.extraction.voice import EXTENSION, save_voice
    from onevoice.files import require_writable

    if out.suffix != EXTENSION:
        raise ConfigError(f"{out}: must end in {EXTENSION}")
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists; choose another name, or overwrite it with --force")
    check_voice(recordings)
    require_writable(out)
    voice = enroll_files(load(pretrained, device=device), recordings)
    save_voice(voice, out)
    print(f"{out}: {voice.describe()}")
    if voice.check_up is not None and voice.check_up.people > 1:
        print("FILE@1:20-1:31 names a stretch, and FILE#2 a person that onevoice voices FILE lists")


def voices(recording: str, *, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """List the people who speak in RECORDING: how long, and the stretch in which each is heard best.

    onevoice extract RECORDING --voice RECORDING#2 --out FILE extracts the second one; --all FOLDER extracts each.

    Args:
        recording: The recording of several people, of any format.
        as_json: Print JSON, with all turns in seconds.
    """
    from onevoice.extraction.enrollment import find_in_file, format_time

    found = find_in_file(recording)
    if as_json:
        print(json.dumps([{**asdict(each), "seconds": each.seconds} for each in found], indent=2))
        return
    for each in found:
        begin, end = each.solo
        print(
            f"{recording}#{each.number}: speaks for {each.seconds:.1f} s in {len(each.turns)} turns; heard best at "
            f"{format_time(begin)}-{format_time(end)}"
        )
    print(f"{recording}: {'1 voice' if len(found) == 1 else f'{len(found)} voices'}")
