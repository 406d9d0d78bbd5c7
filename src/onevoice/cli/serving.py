"""The verb that serves a page and an API: `serve`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from onevoice.cli.using import Pretrained
from onevoice.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from onevoice.extraction.extractor import Extractor


def serve(
    *,
    host: str = "localhost",
    port: int = 8000,
    workers: int = 1,
    max_queued: int = 100,
    max_megabytes: int = 500,
    max_minutes: float = 180,
    max_channels: int = 8,
    keep_minutes: float = 60,
    voices: Path | None = None,
    token_file: Path | None = None,
    pretrained: Pretrained = None,
    live: str | None = None,
    max_streams: int = 4,
    precision: str = "auto",
    device: str = "auto",
) -> None:
    """Serve a page that extracts voices, and an HTTP API, until Ctrl-C.

    By default, only this machine can reach it. Another host needs a token: the environment variable ONEVOICE_TOKEN, or
    --token-file.

    Args:
        host: The name or address to listen on; 0.0.0.0 is all of this machine's.
        port: The port to listen on; 0 takes a free one.
        workers: Extractions at a time.
        max_queued: Extractions that may wait; more are refused.
        max_megabytes: The largest upload, in 10^6 bytes.
        max_minutes: The longest recording.
        max_channels: The most channels of a recording.
        keep_minutes: How long uploads and results are kept.
        voices: The folder for saved voices; by default onevoice/voices below $XDG_DATA_HOME or ~/.local/share.
        token_file: A file with the token, instead of ONEVOICE_TOKEN.
        pretrained: The weights: a published NAME, the PATH of a checkpoint, or hf://OWNER/REPO[@REVISION][/FILE].
            By default, the ones that come with onevoice.
        live: The weights of a causal network for live sound, named in the same way. By default, those of --pretrained
            if they are causal, or the newest published ones that are.
        max_streams: Live streams at a time; more are refused.
        precision: Of the matrix products: float32 or bfloat16; auto is bfloat16 if the processor computes in it.
        device: Where to run the network: cpu, cuda, cuda:1 or mps; auto takes the fastest one available.
    """
    try:
        from onevoice.server.app import serve as run
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f'serve needs {error.name}: pip install "onevoice[serve]"') from error
    from onevoice.extraction.extractor import load
    from onevoice.processes import keep_freed_memory
    from onevoice.server.settings import Limits, Settings, data_folder, is_loopback

    if not 0 <= port <= 65_535:
        raise ConfigError(f"port: must be 0 to 65535, not {port}")
    settings = Settings(
        voices=voices or data_folder(),
        token=_read_token(token_file),
        is_local=is_loopback(host),
        limits=Limits(max_megabytes * 10**6, 60.0 * max_minutes, max_channels),
        workers=workers,
        max_queued=max_queued,
        ttl_seconds=60.0 * keep_minutes,
        max_streams=max_streams,
    )
    keep_freed_memory()
    extractor = load(pretrained, device=device, precision=precision)
    run(extractor, _load_live(live, extractor), settings, host, port, _print_address)


def _load_live(name: str | None, extractor: "Extractor") -> "Extractor | None":
    """Return the network for live sound; None if none is named or published. Raises `ConfigError` if it is not causal.

    Its steps are too small for a GPU.
    """
    from onevoice.extraction.extractor import load
    from onevoice.extraction.live import find_causal_weights

    if name is None:
        if getattr(extractor.card.config, "causal", False):
            return extractor
        try:
            name = find_causal_weights()
        except ConfigError:
            return None
    live = load(name, device="cpu")
    live.engine  # noqa: B018, raises an error for weights that cannot stream
    return live


def _read_token(path: Path | None) -> str | None:
    """Return the token from a file or the environment; None if there is none. Raises `ConfigError`."""
    if path is None:
        return os.environ.get("ONEVOICE_TOKEN") or None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the token cannot be read ({error}); name a text file") from error


def _print_address(address: str) -> None:
    print(f"onevoice: open {address} in a browser; Ctrl-C ends it", flush=True)
