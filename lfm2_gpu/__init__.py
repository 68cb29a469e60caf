"""lfm2_gpu: GPU inference for LFM2 and LFM2-MoE. Names load on first use, so importing is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm2_gpu.api import CompletionOutput, RequestOutput, SamplingParams
    from lfm2_gpu.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "lfm2_gpu.llm",
    "CompletionOutput": "lfm2_gpu.api",
    "RequestOutput": "lfm2_gpu.api",
    "SamplingParams": "lfm2_gpu.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
