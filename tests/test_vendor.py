"""The vendor's sampling values: what they are matched on, and that the checkpoint's own win."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lfm2_gpu.api import SamplingDefaults
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.model_table import PUBLIC_CONFIGS
from lfm2_gpu.vendor import sampling_defaults

GENERAL = SamplingDefaults(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
PRECISE = SamplingDefaults(temperature=0.1, top_k=50, repetition_penalty=1.05)
REASONING = SamplingDefaults(temperature=0.2, top_k=80, repetition_penalty=1.05)
THINKING = SamplingDefaults(temperature=0.05, top_k=50, repetition_penalty=1.05)
GREEDY = SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("LiquidAI/LFM2-24B-A2B", "LFM2-24B-A2B", PRECISE),
        ("LiquidAI/LFM2-8B-A1B", "LFM2-8B-A1B", GENERAL),
        ("LiquidAI/LFM2-1.2B", "LFM2-1.2B", GENERAL),
        ("/models/LFM2-350M/", "LFM2-350M", GENERAL),
        ("LiquidAI/LFM2-1.2B-Extract", "LFM2-1.2B", GREEDY),
        ("LiquidAI/LFM2-350M-ENJP-MT", "LFM2-350M", GREEDY),
        ("LiquidAI/LFM2.5-230M", "LFM2.5-230M", PRECISE),
        ("LiquidAI/LFM2.5-350M", "LFM2.5-350M", PRECISE),
        ("LiquidAI/LFM2.5-1.2B-Instruct", "LFM2.5-1.2B", PRECISE),
        ("LiquidAI/LFM2.5-1.2B-JP-202606", "LFM2.5-1.2B", PRECISE),
        ("LiquidAI/LFM2.5-1.2B-JP", "LFM2.5-1.2B", GENERAL),
        ("LiquidAI/LFM2.5-1.2B-Base", "LFM2.5-1.2B", GENERAL),
        ("LiquidAI/LFM2.5-1.2B-Thinking", "LFM2.5-1.2B", THINKING),
        ("LiquidAI/LFM2.5-8B-A1B", "LFM2.5-8B-A1B", REASONING),
        ("LiquidAI/LFM2.5-24B-A2B", "LFM2.5-24B-A2B", REASONING),
        # a copy under another name is known by its shape
        ("my-finetune", "LFM2-24B-A2B", PRECISE),
        (None, "LFM2.5-8B-A1B", REASONING),
        (None, "LFM2.5-230M", PRECISE),
        (None, "LFM2-1.2B", GENERAL),
        # only the last part of a path is a name
        ("/data/lfm2.5-1.2b-thinking/run3", "LFM2-24B-A2B", PRECISE),
    ],
)
def test_matching(name: str | None, shape: str, wanted: SamplingDefaults) -> None:
    assert sampling_defaults(PUBLIC_CONFIGS[shape], name, {}) == wanted


def test_an_unknown_model_takes_the_general_values() -> None:
    config = replace(PUBLIC_CONFIGS["LFM2-24B-A2B"], vocab_size=1000)
    assert sampling_defaults(config, "something", {}) == GENERAL


def test_checkpoint_values_win_field_by_field() -> None:
    own = {"temperature": 0.7, "top_k": 20, "eos_token_id": 7, "top_p": None}
    found = sampling_defaults(PUBLIC_CONFIGS["LFM2-24B-A2B"], None, own)
    assert found == SamplingDefaults(temperature=0.7, top_k=20, repetition_penalty=1.05)


def test_no_sampling_means_greedy() -> None:
    own = {"do_sample": False, "temperature": 0.7}
    assert sampling_defaults(PUBLIC_CONFIGS["LFM2-8B-A1B"], None, own).temperature == 0


def test_top_k_of_minus_one_keeps_all() -> None:
    assert sampling_defaults(PUBLIC_CONFIGS["LFM2-24B-A2B"], None, {"top_k": -1}).top_k == 0


@pytest.mark.parametrize(
    "own",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"top_k": 1.5},
        {"top_k": -2},
        {"top_k": True},
    ],
)
def test_bad_values_are_refused_by_name(own: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=f"generation_config.json: {next(iter(own))} is"):
        sampling_defaults(PUBLIC_CONFIGS["LFM2-350M"], None, own)
