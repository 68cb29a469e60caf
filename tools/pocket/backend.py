"""What the evaluation needs from a model: log-probabilities and text, by token ids.

``TransformersBackend`` is the reference; an engine is evaluated by writing the same two methods
over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, Lfm2MoeForCausalLM

from .tokenizer import EOT_ID, IM_END_ID, PAD_ID

BATCH = 25
END_IDS = (IM_END_ID, EOT_ID)


class Backend(Protocol):
    """A model as the evaluation sees it."""

    def log_probs(self, rows: list[list[int]]) -> list[list[float]]:
        """Return, for each row, the natural log-probability of every token after the first."""

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: dict[str, Any],
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, up to an end token, which is left out."""


class TransformersBackend:
    """transformers' own implementation, in float32 with the shipped bfloat16 weights."""

    def __init__(self, model: Path) -> None:
        """Load a checkpoint.

        Args:
            model: its folder.
        """
        self.model = Lfm2MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.set_experts_implementation("eager")
        self.model.train(False)
        # the file's own sampling settings would override "do_sample": False in part
        self.model.generation_config = GenerationConfig.from_dict({})

    @torch.inference_mode()
    def log_probs(self, rows: list[list[int]]) -> list[list[float]]:
        """Return, for each row, the natural log-probability of every token after the first."""
        scored = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            width = max(map(len, batch))
            # padding on the right: a causal model's earlier positions do not see it
            ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in batch])
            logits = self.model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            picked = logits.gather(-1, ids[:, 1:, None])[..., 0]
            scored += [picked[i, : len(row) - 1].tolist() for i, row in enumerate(batch)]
        return scored

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: dict[str, Any],
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, up to an end token, which is left out."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for i, ids in zip(
                chosen,
                self._generate([prompts[i] for i in chosen], max_tokens, sampling, ignore_eos),
                strict=True,
            ):
                texts[i] = ids
        return texts

    def _generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: dict[str, Any],
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        pads = [width - len(p) for p in prompts]
        # transformers types the mixin's self as a protocol that its own classes miss
        model: Any = self.model
        out = model.generate(
            torch.tensor([[PAD_ID] * n + p for n, p in zip(pads, prompts, strict=True)]),
            attention_mask=torch.tensor(
                [[0] * n + [1] * len(p) for n, p in zip(pads, prompts, strict=True)]
            ),
            max_new_tokens=max_tokens,
            eos_token_id=None if ignore_eos else list(END_IDS),
            pad_token_id=PAD_ID,
            **sampling,
        )
        rows = [row[width:].tolist() for row in out]
        return rows if ignore_eos else [_until_end(row) for row in rows]


def _until_end(row: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in END_IDS]
    return row[: ends[0]] if ends else row
