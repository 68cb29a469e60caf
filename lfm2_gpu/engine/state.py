"""DeviceState: what lives on the device between steps, and the records that change it.

Pools of KV pages and conv rings, and one entry per slot of everything else: page-table row, last
token, next position, sampling parameters, penalty state. A plan's admissions and page writes are
applied at the head of its step; nothing is cleared when a request leaves, since an admission writes
all that its slot's next occupant can read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.engine.config import PAGE_SIZE, EngineConfig, pages_for
from lfm2_gpu.engine.constraints import mask_words, token_bits
from lfm2_gpu.engine.request import Plan, Request
from lfm2_gpu.model.batch import StatePools

__all__ = ["DeviceState", "state_bytes"]

MIN_TOP_P = 2.0**-126


def state_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part of the device state, before any of it is taken."""
    slots, width = config.max_num_seqs + 1, mask_words(model.vocab_size)
    kv_page = model.num_attention_layers * 2 * model.num_key_value_heads * PAGE_SIZE
    ring = model.num_conv_layers * slots * model.conv_L_cache * model.hidden_size
    return {
        "kv_pages": (config.num_pages + 1) * kv_page * model.head_dim * dtype.itemsize,
        "conv_state": ring * dtype.itemsize,
        "page_table": slots * pages_for(config.max_model_len) * 4,
        "penalty_masks": slots * width * 4,
        # counts and biases, if every slot uses them, and half of them again while they grow
        "dense_rows": slots * model.vocab_size * 12,
    }


class DeviceState:
    """Allocates everything once, for ``config.max_num_seqs`` slots and the dummy slot 0."""

    def __init__(
        self, model: ModelConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = config.max_num_seqs + 1
        page = (2, model.num_key_value_heads, PAGE_SIZE, model.head_dim)
        ring = (slots, model.conv_L_cache, model.hidden_size)
        self.pools = StatePools(
            kv_pages=tuple(
                torch.zeros(config.num_pages + 1, *page, dtype=dtype, device=device)
                for _ in range(model.num_attention_layers)
            ),
            conv_state=tuple(
                torch.zeros(ring, dtype=dtype, device=device) for _ in range(model.num_conv_layers)
            ),
        )

        def column(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros(slots, *width, dtype=dtype, device=device)

        self.page_table = column(torch.int32, pages_for(config.max_model_len))
        self.first_computed = column(torch.int32)
        self.kv_write_from = column(torch.int32)
        self.last_token = column(torch.int32)
        self.position = column(torch.int32)
        self.temperature = column(torch.float32)
        self.top_k = column(torch.int32)
        self.top_p = column(torch.float32)
        self.min_p = column(torch.float32)
        self.seeds = column(torch.int64)
        self.choices = column(torch.int32)
        self.repetition_penalty = column(torch.float32)
        self.presence_penalty = column(torch.float32)
        self.frequency_penalty = column(torch.float32)
        self.seen = column(torch.int32, mask_words(model.vocab_size))
        self.dense = DenseRows(slots, model.vocab_size, device)
        self._device = device

    def apply(self, plan: Plan) -> None:
        """Write the plan's admissions and page-table entries."""
        if plan.page_ids:
            slots, columns, pages = self._upload(
                np.array([plan.page_slots, plan.page_columns, plan.page_ids], np.int32)
            )
            self.page_table[slots.long(), columns.long()] = pages
        if plan.admitted:
            self._admit(plan.admitted)

    def _admit(self, requests: Sequence[Request]) -> None:
        slots = self._upload(np.array([r.slot for r in requests], np.int64))
        params = [r.params for r in requests]
        self.position[slots] = 0
        for column, values in (
            (self.temperature, [p.temperature for p in params]),
            (self.top_k, [p.top_k for p in params]),
            # what fp32 would round to 0 keeps the most likely token, as any small top_p does
            (self.top_p, [max(p.top_p or 0.0, MIN_TOP_P) for p in params]),
            (self.min_p, [p.min_p for p in params]),
            (self.seeds, [r.seed for r in requests]),
            (self.choices, [r.index for r in requests]),
            (self.repetition_penalty, [p.repetition_penalty for p in params]),
            (self.presence_penalty, [p.presence_penalty for p in params]),
            (self.frequency_penalty, [p.frequency_penalty for p in params]),
        ):
            column[slots] = torch.tensor(values, dtype=column.dtype).to(self._device)
        words = self.seen.shape[1]
        seen = np.stack([token_bits(r.prompt + r.output, words) for r in requests])
        self.seen[slots] = self._upload(seen)
        for request in requests:
            self.dense.admit(request)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


class DenseRows:
    """Rows of vocabulary width for the requests that need them: output counts and logit bias.

    A slot without them points at row 0, which means none. Rows are taken at admission and found
    again by slot, so a slot's next occupant takes its row over or lets it go.
    """

    def __init__(self, slots: int, vocab_rows: int, device: torch.device) -> None:
        self.row = torch.zeros(slots, dtype=torch.int32, device=device)
        self.counts = torch.zeros(1, vocab_rows, dtype=torch.int32, device=device)
        self.logit_bias = torch.zeros(1, vocab_rows, dtype=torch.float32, device=device)
        self._row_of_slot: dict[int, int] = {}
        self._free: list[int] = []

    def admit(self, request: Request) -> None:
        """Give the request's slot a row of its own if it uses one, else row 0."""
        params, slot = request.params, request.slot
        wanted = bool(params.presence_penalty or params.frequency_penalty or params.logit_bias)
        row = self._row_of_slot.pop(slot, 0)
        if not wanted:
            if row:
                self._free.append(row)
                self.row[slot] = 0
            return
        row = row or self._take()
        self._row_of_slot[slot] = row
        self.row[slot] = row
        device = self.row.device
        self.counts[row] = 0
        if request.output:
            drawn = torch.tensor(request.output, device=device)
            self.counts[row] = torch.bincount(drawn, minlength=self.counts.shape[1]).int()
        self.logit_bias[row] = 0
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self.logit_bias[row, ids] = values.to(device)

    def _take(self) -> int:
        if not self._free:
            have = self.counts.shape[0]
            grown = max(8, 2 * have)
            self.counts = _grow(self.counts, grown)
            self.logit_bias = _grow(self.logit_bias, grown)
            self._free = list(range(grown - 1, have - 1, -1))
        return self._free.pop()


def _grow(rows: torch.Tensor, count: int) -> torch.Tensor:
    grown = rows.new_zeros(count, rows.shape[1])
    grown[: rows.shape[0]] = rows
    return grown
