"""The README's quick start runs as printed, and its table says what the code computes."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

from lfm2_gpu.cli import _parser
from lfm2_gpu.engine.config import EngineConfig, pages_for
from lfm2_gpu.engine.memory import activation_bytes
from lfm2_gpu.engine.state import state_bytes
from lfm2_gpu.model_table import PUBLIC_CONFIGS
from support import ROOT, python_lines

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_quick_start_runs() -> None:
    [code] = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    lines = python_lines(code, CUDA_VISIBLE_DEVICES="")
    assert lines[0].startswith("sampling defaults: ")
    assert lines[1].startswith("A river is -> ")
    assert len(lines) >= 4


def test_commands_parse() -> None:
    parser = _parser()
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    ours = [line for line in commands if line.startswith("lfm2-gpu ")]
    assert len(ours) == 4
    for line in ours:
        words = shlex.split(line, comments=True)[1:]
        options, rest = parser.parse_known_args(words)
        assert callable(options.run)
        assert not any(word.startswith("-") for word in rest)


ROWS = re.findall(r"^\| (LFM2\S*(?:, \S+)?) \| (.*) \|$", README, flags=re.M)


def test_every_public_model_is_in_the_table() -> None:
    assert {name for names, _ in ROWS for name in names.split(", ")} == set(PUBLIC_CONFIGS)


@pytest.mark.parametrize(
    ("name", "cells"), [(n, cells) for names, cells in ROWS for n in names.split(", ")]
)
def test_memory_table(name: str, cells: str) -> None:
    config = PUBLIC_CONFIGS[name]
    context = config.default_max_model_len
    # the defaults of LLM on a GPU
    engine = EngineConfig(
        max_model_len=context,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        num_pages=pages_for(context),
        vocab_size=config.vocab_size,
    )
    weights = 2 * config.num_parameters
    state = state_bytes(config, engine, torch.bfloat16)
    needed = weights + sum(state.values()) + activation_bytes(config, engine, torch.bfloat16)
    layers = config.layer_types.count("full_attention")
    kv = 1000 * layers * 2 * config.num_key_value_heads * config.head_dim * 2
    *exact, stated = cells.split(" | ")
    assert exact == [
        f"{config.num_parameters:,}",
        f"{context:,}",
        f"{weights / 1e9:.1f} GB",
        f"{kv / 1e6:.1f} MB",
    ]
    # rounded up to the next half, a little early: small buffers come and go
    assert 0 <= float(stated.removesuffix(" GB")) - needed / 1e9 < 0.75


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
