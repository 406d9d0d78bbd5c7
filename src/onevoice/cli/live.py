"""The verbs for running streams and other runtimes: `live` and `export`."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from onevoice.cli.using import Pretrained
from onevoice.errors import ConfigError


def live(
    *,
    voice: list[str] | None = None,
    input_: Annotated[str | None, Parameter(name="--input")] = None,
    output: str | None = None,
    microphone: str | None = None,
    loudspeaker: str | None = None,
    devices: bool = False,
    strength: float = 1.0,
    absent: str = "keep",
    seconds: float | None = None,
    force: bool = False,
    pretrained: Pretrained = None,
) -> None:
    """Take one voice out of the microphone and play it, until Ctrl-C.

    It needs the weights of a causal network. Without --voice, everything passes through until one person has spoken
    for 3 s; that person is then extracted.

    Args:
        voice: The enrollment: a FILE, a stretch of one (FILE@1:20-1:31), a person whom onevoice voices lists (FILE#2),
            or a saved voice (FILE.voice). Several recordings of the person: repeat it.
        input_: A recording to use instead of the microphone; it takes the same path, as fast as the machine can.
        output: With --input, the file to write, as long as the recording and at its rate.
        microphone: Number or part of the name of the input device. By default, the one of the system.
        loudspeaker: Number or part of the name of the output device.
        devices: List the devices and exit.
        strength: The share of the voice in the output, from 0, everything as it came, to 1.
        absent: What to do where the voice is not heard: keep the output, mute it, or turn it down by a number of dB.
        seconds: Stop after this time.
        force: Replace the output if it exists.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the newest published ones of a causal network.
    """
    from onevoice.extraction.enrollment import enroll_files
    from onevoice.extraction.extractor import load
    from onevoice.extraction.live import (
        counts,
        find_causal_weights,
        latency_line,
        list_devices,
        run_devices,
        run_file,
    )
    from onevoice.extraction.request import parse_absent
    from onevoice.extraction.stream import Stream

    absent_db = parse_absent(absent)
    if devices:
        print(list_devices())
        return
    if (input_ is None) != (output is None):
        raise ConfigError("--input and --output: belong together; give both, or none for the microphone")
    extractor = load(find_causal_weights() if pretrained is None else pretrained, device="cpu")
    extractor.engine  # noqa: B018, raises an error for weights that cannot stream before anything is enrolled
    wanted = None if voice is None else enroll_files(extractor, voice)
    if wanted is not None:
        print(wanted.describe(), file=sys.stderr)

    def open_stream(sample_rate: int) -> Stream:
        if wanted is not None:
            return extractor.stream(wanted, sample_rate, strength, absent_db)
        stream = extractor.live(sample_rate, background=input_ is None)
        stream.strength, stream.absent_db = strength, absent_db
        return stream

    def say(line: str) -> None:
        end = "\r" if line.startswith("in ") and sys.stderr.isatty() else "\n"
        print(line, end=end, file=sys.stderr, flush=True)

    if input_ is not None and output is not None:
        pump = run_file(input_, output, open_stream, force)
        say(latency_line(pump.stream))
    else:
        pump = run_devices(open_stream, _device(microphone), _device(loudspeaker), seconds, say)
    print(counts(pump), file=sys.stderr)
    if pump.stream.voice is None:
        print("no voice was heard for 3 s, so everything passed through", file=sys.stderr)


def _device(name: str | None) -> int | str | None:
    return int(name) if name is not None and name.isdigit() else name


def export_(model: str, folder: Path) -> None:
    """Write a network as ONNX graphs, which run without PyTorch (onevoice.onnx).

    FOLDER gets enroll.onnx and extract.onnx, and for a causal network voice.onnx and step.onnx, with the card of the
    weights in their metadata.

    Args:
        model: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
        folder: Where to write the graphs.
    """
    from onevoice.extraction.export import export
    from onevoice.extraction.extractor import load

    for path in export(load(model, device="cpu"), folder):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
