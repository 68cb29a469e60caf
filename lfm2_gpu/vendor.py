"""The sampling values that Liquid AI recommends, for checkpoints that do not carry their own.

A checkpoint's generation_config.json wins field by field. For the rest, the first of these that
matches decides:

1. The checkpoint's name (a hub id or the last part of its path), case ignored: ``_BY_NAME``, in
   order, so that ``LFM2.5-1.2B-Thinking`` is met before ``LFM2.5``.
2. Its shape, which tells a renamed or fine-tuned copy: ``_BY_PARAMETERS``. Where two generations
   share a shape it stands for the older one.
3. Otherwise the family's general recommendation, ``_GENERAL``.

Sources: the model cards on the hub, the vendor's text-generation guide, and vLLM's LFM2.5 recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lfm2_gpu.api import SamplingDefaults
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.model_table import PUBLIC_CONFIGS

__all__ = ["sampling_defaults"]

_GENERAL = SamplingDefaults(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
_PRECISE = SamplingDefaults(temperature=0.1, top_k=50, repetition_penalty=1.05)
_THINKING = SamplingDefaults(temperature=0.05, top_k=50, repetition_penalty=1.05)
_REASONING = SamplingDefaults(temperature=0.2, top_k=80, repetition_penalty=1.05)
_GREEDY = SamplingDefaults(temperature=0.0)

_BY_NAME = (
    (r"lfm2[.\d]*-.*-(extract|rag|tool|enjp-mt|translate)\b", _GREEDY),
    (r"lfm2\.5-1\.2b-thinking", _THINKING),
    (r"lfm2\.5-1\.2b-(base|jp(?!-\d))", _GENERAL),
    (r"lfm2\.5-(230m|350m|1\.2b)", _PRECISE),
    (r"lfm2\.5-(2\.6b|8b-a1b|24b-a2b)", _REASONING),
    (r"lfm2-24b-a2b", _PRECISE),
    (r"lfm2-", _GENERAL),
)
_BY_PARAMETERS = {
    PUBLIC_CONFIGS["LFM2.5-230M"].num_parameters: _PRECISE,
    PUBLIC_CONFIGS["LFM2-24B-A2B"].num_parameters: _PRECISE,
    PUBLIC_CONFIGS["LFM2.5-2.6B"].num_parameters: _REASONING,
    PUBLIC_CONFIGS["LFM2.5-8B-A1B"].num_parameters: _REASONING,
    PUBLIC_CONFIGS["LFM2.5-24B-A2B"].num_parameters: _REASONING,
}
# lowest and highest value of each, and whether the lowest itself is out
_RANGES = {
    "temperature": (0, 100, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
}


def sampling_defaults(
    config: ModelConfig, name: str | None, generation_config: Mapping[str, Any]
) -> SamplingDefaults:
    """What the sampling fields that a request leaves open take.

    Args:
        config: The model's shape.
        name: Hub id or directory name of the checkpoint, if known.
        generation_config: The parsed generation_config.json; empty if there is none. Its
            ``do_sample: false`` means greedy.

    Raises:
        ModelFileError: A sampling value of ``generation_config`` is not a number in its range.
    """
    return replace(_recommended(config, name), **_own_values(generation_config))


def _recommended(config: ModelConfig, name: str | None) -> SamplingDefaults:
    label = (name or "").rstrip("/").rpartition("/")[2].lower()
    for pattern, values in _BY_NAME:
        if re.search(pattern, label):
            return values
    return _BY_PARAMETERS.get(config.num_parameters, _GENERAL)


def _own_values(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for name, (low, high, open_low) in _RANGES.items():
        value = generation_config.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            _refuse(name, value, f"a number in [{low}, {high}]")
        if open_low and value == low:
            _refuse(name, value, f"more than {low}")
        own[name] = float(value)
    top_k = generation_config.get("top_k")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not -1 <= top_k < 2**31:
            _refuse("top_k", top_k, "an integer from -1 up")
        own["top_k"] = max(top_k, 0)
    if generation_config.get("do_sample") is False:
        own["temperature"] = 0.0
    return own


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ModelFileError(f"generation_config.json: {name} is {repr(value)[:80]}, want {wanted}")
