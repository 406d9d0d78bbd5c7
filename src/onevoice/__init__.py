"""Target speaker extraction: give it a recording of several people and a few seconds of one, get that voice back.

    import onevoice

    extractor = onevoice.load()
    voice = extractor.extract(mixture, 16_000, enrollment, 16_000)

The public names are loaded on first use, so importing the package costs almost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onevoice.errors import OnevoiceError as OnevoiceError
    from onevoice.extraction import onnx as onnx
    from onevoice.extraction.enrollment import separate as separate
    from onevoice.extraction.extractor import Extractor as Extractor
    from onevoice.extraction.extractor import load as load
    from onevoice.mixing.generator import MixtureGenerator as MixtureGenerator
    from onevoice.models import SpExPlus as SpExPlus
    from onevoice.models import SpExPlusConfig as SpExPlusConfig
    from onevoice.training.loss import MultiLoss as MultiLoss

    __version__: str

_MODULES = {
    "Extractor": "onevoice.extraction.extractor",
    "MixtureGenerator": "onevoice.mixing.generator",
    "MultiLoss": "onevoice.training.loss",
    "OnevoiceError": "onevoice.errors",
    "SpExPlus": "onevoice.models",
    "SpExPlusConfig": "onevoice.models",
    "load": "onevoice.extraction.extractor",
    "separate": "onevoice.extraction.enrollment",
}
__all__ = ["__version__", "onnx", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("onevoice")
    if name == "onnx":
        return importlib.import_module("onevoice.extraction.onnx")
    if name not in _MODULES:
        raise AttributeError(f"module 'onevoice' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
