"""The memory plan: what is taken is what was counted, and what does not fit is said."""

from __future__ import annotations

import logging

import pytest
import torch

import lfm2_kernels as ops
from lfm2_gpu.engine.config import PAGE_SIZE
from lfm2_gpu.engine.memory import activation_bytes, plan_engine
from lfm2_gpu.engine.state import DeviceState, state_bytes
from lfm2_gpu.errors import CapacityError
from lfm2_gpu.model_table import PUBLIC_CONFIGS
from tiny_engine import CONFIG, tiny_engine

SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "vocab_size": CONFIG.vocab_size}


def plan(budget: int, max_model_len: int = 512) -> object:
    return plan_engine(
        CONFIG, dtype=torch.float32, budget=budget, max_model_len=max_model_len, **SIZES
    )


def test_the_plan_counts_what_the_state_takes() -> None:
    config = tiny_engine().config
    state = DeviceState(CONFIG, config, torch.float32, torch.device("cpu"))
    planned = state_bytes(CONFIG, config, torch.float32)
    assert sum(t.nbytes for t in state.pools.kv_pages) == planned["kv_pages"]
    assert sum(t.nbytes for t in state.pools.conv_state) == planned["conv_state"]
    assert state.page_table.nbytes == planned["page_table"]
    assert state.seen.nbytes == planned["penalty_masks"]


def test_host_and_kernels_agree_on_the_page() -> None:
    assert PAGE_SIZE == ops.PAGE_SIZE


def test_all_requests_fit_where_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lfm2_gpu"):
        config = plan(2**30)
    assert config.num_pages == 8 * 8
    assert config.max_model_len == 512
    assert "KV cache size: 4,096 tokens, maximum concurrency for 512 tokens: 8.00x" in caplog.text


def test_a_small_device_gets_a_shorter_context_or_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = plan(2**30)
    state = state_bytes(CONFIG, full, torch.float32)
    page = state.pop("kv_pages") // (full.num_pages + 1)
    least = sum(state.values()) + activation_bytes(CONFIG, full, torch.float32)
    small = plan(least + 4 * page)
    assert (small.num_pages, small.max_model_len) == (3, 192)
    assert "max_model_len 512 -> clamped to 192" in caplog.text
    with pytest.raises(CapacityError, match=r"are free and .* are needed for max_num_seqs 8"):
        plan(least + page)


def test_24b_leaves_room_for_the_published_workload_on_80_gb() -> None:
    config = PUBLIC_CONFIGS["LFM2-24B-A2B"]
    free = (78 * 2**30) - 2 * config.num_parameters
    planned = plan_engine(
        config,
        dtype=torch.bfloat16,
        budget=int(free * 0.97),
        max_model_len=1536,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        vocab_size=64_400,
    )
    # 1,042 sequences of 1,536 tokens by the roofline, without state and activations
    assert 900 < planned.num_pages / 24 <= 1024
