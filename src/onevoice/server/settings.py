"""What can be set about a server."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from onevoice.errors import ConfigError

MIN_TOKEN_LENGTH = 16
"""Shorter tokens can be guessed."""


@dataclass(frozen=True)
class Limits:
    """What one upload may hold."""

    max_bytes: int = 500 * 10**6
    """Of all files of a request together."""
    max_seconds: float = 3 * 3600.0
    max_channels: int = 8


def data_folder() -> Path:
    """Return the folder for saved voices: below $XDG_DATA_HOME, or ~/.local/share."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "onevoice" / "voices"


@dataclass(frozen=True)
class Settings:
    """What holds for a server as long as it runs."""

    voices: Path
    """The folder for saved voices."""
    token: str | None = None
    """What every request must name; None: no token."""
    is_local: bool = True
    """Whether only this machine reaches the server. Then requests must name it by a local name."""
    limits: Limits = Limits()
    workers: int = 1
    """Extractions at a time."""
    max_queued: int = 100
    """Extractions that may wait."""
    ttl_seconds: float = 3600.0
    """How long results and uploads are kept."""
    max_streams: int = 4
    """Live streams at a time."""
    idle_seconds: float = 30.0
    """A live stream ends if nothing comes, or nothing is taken, for this long."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a server that everybody could use, and for numbers that make no sense."""
        if self.token is not None and len(self.token) < MIN_TOKEN_LENGTH:
            raise ConfigError(f"token: has {len(self.token)} characters; use {MIN_TOKEN_LENGTH} or more")
        if self.token is None and not self.is_local:
            raise ConfigError(
                "host: other machines can reach it, so it needs a token; set ONEVOICE_TOKEN, for example to the "
                "output of openssl rand -hex 16, or use --host localhost"
            )
        for name in ("workers", "max_queued", "ttl_seconds", "max_streams", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: must be above 0, not {getattr(self, name)}")


def is_loopback(host: str) -> bool:
    """Check whether an address or a name stands for this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
