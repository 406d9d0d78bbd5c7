"""Where a network runs."""

import importlib.util
import os
import shutil

import torch

from onevoice.errors import ConfigError


def pick_device(name: str = "auto", key: str = "device") -> torch.device:
    """Return the torch device of a name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `ConfigError`, naming `key`, for a device that torch does not know or has not got.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # what torch raises for cuda in a build without it
        raise ConfigError(
            f"{key}: {name!r} is not there for torch; choose auto, cpu, or cuda where there is one"
        ) from error
    return torch.device(name)


def missing_for_compiling(device: torch.device) -> str | None:
    """Return what `torch.compile` would need for a device and does not find; None when it can work."""
    if device.type == "cpu":
        names = [os.environ.get("CXX", "g++"), "clang++"]
        return None if any(map(shutil.which, names)) else "a C++ compiler (g++ or clang++)"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    return f"a compiler for {device.type}"
