"""The memory plan: what an engine takes from its device, in one table, before it takes any."""

from __future__ import annotations

import logging
import os

import torch

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.engine.config import PAGE_SIZE, EngineConfig, pages_for
from lfm2_gpu.engine.scheduler import PROMPT_LOGPROBS_CHUNK
from lfm2_gpu.engine.state import state_bytes
from lfm2_gpu.errors import CapacityError

__all__ = ["free_bytes", "plan_engine"]

logger = logging.getLogger(__name__)

# a CPU engine shares its memory with everything else on the machine
CPU_SHARE = 0.25


def free_bytes(device: torch.device, utilization: float) -> int:
    """The share ``utilization`` of the device memory that is free, or of a CPU_SHARE of a CPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * utilization)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE * utilization)


def plan_engine(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    budget: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    vocab_size: int,
    unused_ids: tuple[int, ...] = (),
    num_gpu_blocks_override: int | None = None,
) -> EngineConfig:
    """Size the pools for ``budget`` bytes that are free after the weights are loaded.

    Pages go first to one request of ``max_model_len``, then up to what ``max_num_seqs`` of them
    could fill. What does not fit is clamped, and a warning names the number.

    Raises:
        CapacityError: Not even a context of one page fits.
        InvalidRequest: A size is not a positive integer.
    """

    def sized(num_pages: int, max_model_len: int) -> EngineConfig:
        return EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_pages=num_pages,
            vocab_size=vocab_size,
            eos_token_ids=model.eos_token_ids,
            unused_ids=unused_ids,
        )

    most = sized(max_num_seqs * pages_for(max_model_len), max_model_len)
    if num_gpu_blocks_override is not None:
        num_pages = num_gpu_blocks_override
    else:
        fixed = state_bytes(model, most, dtype)
        page = fixed.pop("kv_pages") // (most.num_pages + 1)
        working = activation_bytes(model, most, dtype)
        # a model without attention keeps no pages; it still counts positions in them
        room = (budget - working - sum(fixed.values())) // page if page else most.num_pages
        num_pages = min(most.num_pages, room - 1)
        parts = {**fixed, "activations": working, "kv_pages": (num_pages + 1) * page}
        logger.info("memory: %s", ", ".join(f"{k} {_size(v)}" for k, v in parts.items()))
        if num_pages < 1:
            raise CapacityError(
                f"{_size(budget)} are free and {_size(budget + (2 - room) * page)} are needed "
                f"for max_num_seqs {max_num_seqs} and max_num_batched_tokens "
                f"{max_num_batched_tokens}: lower one of them"
            )
    if num_pages < pages_for(max_model_len):
        fits = num_pages * PAGE_SIZE
        logger.warning(
            "max_model_len %d -> clamped to %d, what the KV pages hold", max_model_len, fits
        )
        max_model_len = fits
    logger.info(
        "KV cache size: %s tokens, maximum concurrency for %s tokens: %.2fx",
        f"{num_pages * PAGE_SIZE:,}",
        f"{max_model_len:,}",
        num_pages / pages_for(max_model_len),
    )
    return sized(num_pages, max_model_len)


def activation_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """An upper estimate of what a step allocates on top of weights and state."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    widest = max(
        3 * model.hidden_size,
        heads * model.head_dim,
        3 * model.intermediate_size,
        model.num_experts_per_tok * (model.moe_intermediate_size + model.hidden_size),
    )
    tokens = config.max_num_batched_tokens
    hidden = tokens * (widest + 4 * model.hidden_size) * dtype.itemsize
    # logits in the model's dtype, processed in fp32, and one temporary of the finite check
    rows = min(tokens, config.max_num_seqs) + PROMPT_LOGPROBS_CHUNK
    return hidden + rows * model.vocab_size * (dtype.itemsize + 4 + 1)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
