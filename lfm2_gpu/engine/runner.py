"""Runner: turns a plan into a ForwardBatch, runs the model, draws tokens, reads them back.

A step is two parts. ``forward`` takes tokens to logits; ``sample`` applies penalties and masks,
draws, and advances the device's state. Between them lies the mask buffer, which the host may still
fill while the forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import lfm2_kernels as ops
from lfm2_gpu.engine.config import EngineConfig
from lfm2_gpu.engine.constraints import mask_words, next_token_mask, token_bits
from lfm2_gpu.engine.request import Plan, TokenLogprobs
from lfm2_gpu.engine.state import DeviceState
from lfm2_gpu.engine.table import SlotTable
from lfm2_gpu.model.batch import ForwardBatch
from lfm2_gpu.model.lfm2 import Lfm2Model

__all__ = ["Runner", "StepResult"]

PromptLogprobs: TypeAlias = "list[tuple[int, TokenLogprobs]]"


@dataclass(slots=True)
class StepResult:
    """What a step drew.

    Attributes:
        tokens: One per sampling row, in row order; -1 where no token could be drawn: the logits
            were not finite, or masks and penalties left none.
        logprobs: By row, for the rows that asked.
        prompt_logprobs: By row: (position, entry) of each prompt token whose predecessor was in
            this step's chunk.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


class Runner:
    """Owns the device state of one engine."""

    def __init__(self, model: Lfm2Model, config: EngineConfig) -> None:
        self.config = config
        self.state = DeviceState(model.config, config, model.dtype, model.device)
        self._model = model
        self._mask_words = mask_words(model.config.vocab_size)
        self._real_ids = ~token_bits(config.unused_ids, self._mask_words)
        self._real_mask = torch.from_numpy(self._real_ids[None].copy()).to(model.device)
        # the mask of rows without one of their own; -1 is none
        self._mask_row = 0 if config.unused_ids else -1

    @torch.inference_mode()
    def run(self, plan: Plan, table: SlotTable) -> StepResult:
        """Run one step to its end."""
        self.state.apply(plan)
        sampling = np.flatnonzero(plan.sampling)
        prompt_rows = _prompt_logprob_rows(plan)
        logits = self._forward(plan, sampling, prompt_rows)
        drawn = logits[: len(sampling)]
        tokens = self._sample(plan, sampling, drawn, table)
        result = StepResult(tokens.cpu().numpy())
        self._add_logprobs(result, plan, sampling, drawn, tokens)
        self._add_prompt_logprobs(result, plan, prompt_rows, logits[len(sampling) :])
        return result

    def _forward(
        self, plan: Plan, sampling: np.ndarray, prompt_rows: dict[int, range]
    ) -> torch.Tensor:
        """Logits ``[L, V]`` of the sampling rows' last tokens, then of ``prompt_rows``' tokens."""
        state, rows = self.state, len(plan.slots)
        bounds = np.zeros(rows + 1, np.int32)
        np.cumsum(plan.query_lens, out=bounds[1:])
        token_rows = np.repeat(np.arange(rows, dtype=np.int32), plan.query_lens)
        offsets = np.arange(bounds[-1], dtype=np.int32) - bounds[token_rows]
        wanted = [bounds[sampling + 1] - 1]
        for row, positions in prompt_rows.items():
            first = bounds[row] - plan.starts[row]
            wanted.append(np.arange(positions.start, positions.stop, dtype=np.int32) + first)
        # one copy takes a step's integers to the device
        parts = [plan.token_ids, token_rows, offsets, bounds, plan.slots, plan.query_lens, *wanted]
        staged = torch.from_numpy(np.concatenate(parts)).to(self._model.device, non_blocking=True)
        sizes = [len(part) for part in parts[:6]]
        sizes.append(len(staged) - sum(sizes))
        host_ids, row_of, offset, query_start_loc, slots, lens, index = torch.split(staged, sizes)
        slot = slots.long()
        token_slot = slot[row_of.long()]
        batch = ForwardBatch(
            token_ids=torch.where(host_ids < 0, state.last_token[token_slot], host_ids),
            positions=state.position[token_slot] + offset,
            token_rows=row_of,
            query_start_loc=query_start_loc,
            slots=slots,
            page_table=state.page_table,
            first_computed=state.first_computed,
            kv_write_from=state.kv_write_from,
            logits_index=index.long(),
            decode_only=plan.decode_only,
            max_seq_len=plan.max_seq_len,
            pools=state.pools,
        )
        logits = self._model.forward(batch)
        state.position[slot] += lens
        return logits

    def _sample(
        self, plan: Plan, sampling: np.ndarray, logits: torch.Tensor, table: SlotTable
    ) -> torch.Tensor:
        """Draw one token per sampling row and advance penalty state and last tokens."""
        state, device = self.state, self._model.device
        slots = torch.from_numpy(plan.slots[sampling]).to(device, non_blocking=True)
        mask, mask_rows = self._masks(plan, sampling, table)
        positions = state.position[slots.long()]
        processed = ops.process_logits(
            logits,
            slots=slots,
            vocab_size=self.config.vocab_size,
            seen=state.seen,
            repetition_penalty=state.repetition_penalty,
            dense_rows=state.dense.row,
            counts=state.dense.counts,
            logit_bias=state.dense.logit_bias,
            presence_penalty=state.presence_penalty,
            frequency_penalty=state.frequency_penalty,
            mask=mask,
            mask_rows=mask_rows,
        )
        tokens = ops.sample(
            processed,
            slots=slots,
            positions=positions,
            temperature=state.temperature,
            top_k=state.top_k,
            top_p=state.top_p,
            min_p=state.min_p,
            seeds=state.seeds,
            choices=state.choices,
        )
        ops.update_seen(
            tokens,
            state.seen,
            state.dense.counts,
            slots=slots,
            positions=positions,
            dense_rows=state.dense.row,
        )
        state.last_token[slots.long()] = tokens
        # NaN and +inf show in a row's maximum, and a row without any token left has -inf
        return torch.where(torch.isfinite(processed.amax(dim=1)), tokens, -1)

    def _masks(
        self, plan: Plan, sampling: np.ndarray, table: SlotTable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks ``[M, W]`` of the constrained rows, and each sampling row's mask or -1."""
        masks = [self._real_ids]
        rows = np.full(len(sampling), self._mask_row, np.int32)
        for i, row in enumerate(sampling.tolist() if plan.requests else ()):
            request = plan.requests.get(row)
            if request is not None:
                mask = next_token_mask(request, table, self._mask_words)
                if mask is not None:
                    rows[i] = len(masks)
                    masks.append(mask & self._real_ids)
        device = self._model.device
        if len(masks) == 1:
            # nobody is constrained: what lies on the device will do
            everyone = torch.full((len(rows),), self._mask_row, dtype=torch.int32, device=device)
            return self._real_mask, everyone
        return torch.from_numpy(np.stack(masks)).to(device), torch.from_numpy(rows).to(device)

    def _add_logprobs(
        self,
        result: StepResult,
        plan: Plan,
        sampling: np.ndarray,
        logits: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        picked, counts = [], []
        for i, row in enumerate(sampling.tolist() if plan.requests else ()):
            request = plan.requests.get(row)
            if request is None or request.params.logprobs is None or result.tokens[i] < 0:
                continue
            picked.append(i)
            counts.append(request.params.logprobs)
        if picked:
            index = torch.tensor(picked, device=logits.device)
            entries = self._token_logprobs(logits[index], tokens[index], counts)
            rows = (int(sampling[i]) for i in picked)
            result.logprobs = dict(zip(rows, entries, strict=True))

    def _add_prompt_logprobs(
        self,
        result: StepResult,
        plan: Plan,
        prompt_rows: dict[int, range],
        logits: torch.Tensor,
    ) -> None:
        start = 0
        for row, positions in prompt_rows.items():
            request = plan.requests[row]
            count = request.params.prompt_logprobs
            assert count is not None
            targets = torch.tensor(
                request.prompt[positions.start + 1 : positions.stop + 1],
                dtype=torch.int32,
                device=logits.device,
            )
            rows = logits[start : start + len(positions)]
            entries = self._token_logprobs(rows, targets, [count] * len(positions))
            result.prompt_logprobs[row] = [
                (position + 1, entry) for position, entry in zip(positions, entries, strict=True)
            ]
            start += len(positions)

    def _token_logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, counts: list[int]
    ) -> list[TokenLogprobs]:
        """Raw log-probabilities of ``tokens`` and, row by row, of the ``counts`` most likely ones.

        Padding rows of the vocabulary stand for no token: they have no part in the distribution.
        """
        logits = logits[:, : self.config.vocab_size].float()
        chosen, ranks = ops.token_logprobs(logits, tokens)
        values, ids = logits.topk(max(counts), dim=1)
        log_sum = logits.logsumexp(dim=1, keepdim=True)
        columns = (
            tokens.tolist(),
            chosen.tolist(),
            ranks.tolist(),
            ids.tolist(),
            (values - log_sum).tolist(),
            counts,
        )
        return [
            TokenLogprobs(token, logprob, rank, tuple(top[:count]), tuple(top_values[:count]))
            for token, logprob, rank, top, top_values, count in zip(*columns, strict=True)
        ]


def _prompt_logprob_rows(plan: Plan) -> dict[int, range]:
    """Positions in each row's chunk whose successor is a prompt token with a wanted logprob."""
    rows = {}
    for row, request in plan.requests.items():
        start, length = int(plan.starts[row]), int(plan.query_lens[row])
        stop = min(start + length, len(request.prompt) - 1)
        if request.params.prompt_logprobs is not None and start < stop:
            rows[row] = range(start, stop)
    return rows
