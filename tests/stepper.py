"""Steps an Lfm2Model without an engine: pages and slots in random order, all state poisoned.

Also the sensitivity gate: which faults in a model's state would go unseen in its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from lfm2_gpu.model.batch import ForwardBatch, StatePools
from lfm2_gpu.model.lfm2 import Lfm2Model

__all__ = ["Stepper", "blind_spots", "greedy"]

PAGE = 64


class Stepper:
    """Sequences on slots and pages of an Lfm2Model.

    Attributes:
        lengths: Tokens computed so far, by sequence.
        slots: State slot, by sequence.
        page_table, first_computed, kv_write_from: By slot, as in ``ForwardBatch``.
        pools: KV pages and conv rings; NaN where nothing was written.
    """

    def __init__(self, model: Lfm2Model, sequences: int, max_len: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        config, self.model = model.config, model
        per_sequence = -(-max_len // PAGE)
        pages = 1 + sequences * per_sequence + 2
        # slot 0 and page 0 are the dummies
        self.slots = rng.sample(range(1, sequences + 3), sequences)
        free = rng.sample(range(1, pages), sequences * per_sequence)
        self.page_table = torch.zeros(sequences + 3, per_sequence, dtype=torch.int32)
        for slot in self.slots:
            for i in range(per_sequence):
                self.page_table[slot, i] = free.pop()
        self.page_table = self.page_table.to(model.device)
        self.first_computed = torch.zeros(sequences + 3, dtype=torch.int32, device=model.device)
        self.kv_write_from = self.first_computed.clone()
        self.lengths = [0] * sequences
        kv = (pages, 2, config.num_key_value_heads, PAGE, config.head_dim)
        ring = (sequences + 3, config.conv_L_cache, config.hidden_size)
        poison = {"fill_value": float("nan"), "dtype": model.dtype, "device": model.device}
        self.pools = StatePools(
            tuple(torch.full(kv, **poison) for _ in range(config.num_attention_layers)),
            tuple(torch.full(ring, **poison) for _ in range(config.num_conv_layers)),
        )

    def step(
        self, spans: Sequence[tuple[int, Sequence[int]]], *, padding: int = 0
    ) -> list[torch.Tensor]:
        """Compute the next tokens of some sequences, and padding rows after them.

        Args:
            spans: Sequence and tokens; each sequence at most once.
            padding: Rows of one padding token each.

        Returns:
            ``[len(tokens), vocab]`` logits of each span.
        """
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        starts, slots = [0], []
        for row, (sequence, ids) in enumerate(spans):
            begin = self.lengths[sequence]
            tokens += ids
            positions += range(begin, begin + len(ids))
            rows += [row] * len(ids)
            starts.append(len(tokens))
            slots.append(self.slots[sequence])
            self.lengths[sequence] = begin + len(ids)
        live = len(tokens)
        for row in range(len(spans), len(spans) + padding):
            tokens.append(0)
            positions.append(-1)
            rows.append(row)
            starts.append(len(tokens))
            slots.append(0)
        logits = self.model.forward(
            ForwardBatch(
                token_ids=self._ints(tokens),
                positions=self._ints(positions),
                token_rows=self._ints(rows),
                query_start_loc=self._ints(starts),
                slots=self._ints(slots),
                page_table=self.page_table,
                first_computed=self.first_computed,
                kv_write_from=self.kv_write_from,
                logits_index=torch.arange(live, device=self.model.device),
                decode_only=len(tokens) == len(slots),
                max_seq_len=max(*positions, 0) + 1,
                pools=self.pools,
            )
        )
        return list(logits.split([len(ids) for _, ids in spans]))

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.model.device)


def greedy(
    model: Lfm2Model,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    fault: Callable[[Stepper], None] | None = None,
    unlike: list[list[int]] | None = None,
) -> list[list[int]]:
    """Greedy tokens of prompts that run together.

    Args:
        model: The model.
        prompts: One list of token ids a sequence.
        count: Tokens to generate.
        fault: Strikes the state once, after the prompts.
        unlike: Stop early at the first token that differs from these texts.
    """
    stepper = Stepper(model, len(prompts), max(map(len, prompts)) + count)
    logits = stepper.step(list(enumerate(prompts)))
    if fault is not None:
        fault(stepper)
    texts = [[int(part[-1].argmax())] for part in logits]
    for at in range(1, count):
        logits = stepper.step([(i, text[-1:]) for i, text in enumerate(texts)])
        for text, part in zip(texts, logits, strict=True):
            text.append(int(part[-1].argmax()))
        if unlike is not None and any(a[at] != b[at] for a, b in zip(texts, unlike, strict=True)):
            break
    return texts


def blind_spots(model: Lfm2Model, *, seed: int = 0, count: int = 32) -> list[str]:
    """Faults in the state after a prompt that do not change ``count`` greedy tokens.

    Each fault is in one layer alone: a conv ring swapped with the neighbour's, zeroed or shifted by
    one position; the last position's keys and values taken from the neighbour, the first's lost.

    A model is fit to test state with if nearly all are seen: at most one in twenty may be listed.
    """
    rng = random.Random(seed)
    vocab = model.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(length)] for length in (23, 17)]
    right = greedy(model, prompts, count)
    faults: dict[str, Callable[[Stepper], None]] = {}
    for layer in range(model.config.num_conv_layers):
        for name, strike in (("swapped", _swap), ("zeroed", _zero), ("shifted", _shift)):
            faults[f"conv ring {layer} {name}"] = _at(strike, layer)
    for layer in range(model.config.num_attention_layers):
        for name, strike in (("stale", _stale), ("lost", _lose)):
            faults[f"kv pages {layer} {name}"] = _at(strike, layer)
    return [
        name
        for name, fault in faults.items()
        if greedy(model, prompts, count, fault=fault, unlike=right) == right
    ]


def _at(strike: Callable[[Stepper, int], None], layer: int) -> Callable[[Stepper], None]:
    return lambda stepper: strike(stepper, layer)


def _swap(stepper: Stepper, layer: int) -> None:
    state, a, b = stepper.pools.conv_state[layer], *stepper.slots[:2]
    state[[a, b]] = state[[b, a]]


def _zero(stepper: Stepper, layer: int) -> None:
    stepper.pools.conv_state[layer][stepper.slots[0]] = 0


def _shift(stepper: Stepper, layer: int) -> None:
    state, slot = stepper.pools.conv_state[layer], stepper.slots[0]
    state[slot] = state[slot].roll(1, dims=0)


def _stale(stepper: Stepper, layer: int) -> None:
    pages = stepper.pools.kv_pages[layer]
    mine, other = (int(stepper.page_table[slot, 0]) for slot in stepper.slots[:2])
    last = min(stepper.lengths[:2]) - 1
    pages[mine, :, :, last] = pages[other, :, :, last]


def _lose(stepper: Stepper, layer: int) -> None:
    pages = stepper.pools.kv_pages[layer]
    pages[int(stepper.page_table[stepper.slots[0], 0]), :, :, 0] = 0
