"""Logits against transformers on random checkpoints: whole prompts, ragged chunks, decode steps.

Each prompt runs alone in transformers, and among others,
with padding rows, on shuffled pages and slots and NaN-filled state here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import build, oracle
from lfm2_gpu.loader import load_model
from lfm2_gpu.model.lfm2 import Lfm2Model
from stepper import Stepper

# derived in docs/numerics.md for logits of unit scale; 1.1e-5 seen
FP32_BOUND = 2e-5
LENGTHS = (133, 64, 9)
C, A = "conv", "full_attention"


def heads(hidden: int, query: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        **more,
    }


def experts(count: int, top_k: int, size: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_experts": count, "num_experts_per_tok": top_k, "moe_intermediate_size": size}
    return {"moe": True, **sizes, **more}


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-96-group3": heads(96, 3, 1),
    "dense-128-group1": heads(128, 4, 4),
    "dense-128-group2": heads(128, 4, 2, flat_theta=True),
    "dense-160-group5": heads(160, 5, 1, intermediate_size=200),
    "dense-192-group3": heads(192, 6, 2, conv_bias=True),
    "dense-256-group8": heads(256, 8, 1, rope_parameters={"rope_theta": 1e4}),
    "dense-320-head64": heads(320, 5, 1, vocab_size=131),
    "dense-256-head64": heads(256, 4, 2, conv_L_cache=4),
    "dense-head64-explicit": heads(96, 3, 1, head_dim=64),
    "dense-head32-explicit": heads(100, 6, 2, head_dim=32),
    "dense-untied": {"tie_word_embeddings": False},
    "dense-taps4-bias": {"conv_L_cache": 4, "conv_bias": True},
    "dense-taps2": {"conv_L_cache": 2},
    "dense-adjusted-ff": {"block_auto_adjust_ff_dim": True, "intermediate_size": 300},
    "dense-eps": {"norm_eps": 1e-3, "flat_theta": True},
    "dense-attention-only": {"num_hidden_layers": 2, "layer_types": [A, A]},
    "dense-conv-only": {"num_hidden_layers": 3, "layer_types": [C, C, C]},
    "moe": {"moe": True},
    "moe-4-top1": experts(4, 1, 48),
    "moe-4-top4": experts(4, 4, 33),
    "moe-16-top4": experts(16, 4, 40, **heads(128, 4, 1)),
    "moe-7-top3": experts(7, 3, 64, flat_theta=True, conv_L_cache=4),
    "moe-no-bias": experts(8, 2, 64, use_expert_bias=False),
    "moe-unnormalised": experts(8, 2, 64, norm_topk_prob=False, routed_scaling_factor=1.7),
    "moe-untied": experts(8, 2, 64, tie_word_embeddings=False, conv_bias=True),
    "moe-320": experts(8, 2, 64, **heads(320, 5, 1), num_dense_layers=2),
    "moe-head64": experts(12, 3, 64, **heads(192, 3, 1), num_dense_layers=0),
    "moe-theta": experts(8, 2, 64, rope_parameters={"rope_theta": 5e6}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed = list(CASES).index(request.param)
    return build(tmp_path_factory.mktemp("checkpoint"), seed, **CASES[request.param])


def prompts(vocab: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(vocab) for _ in range(length)] for length in LENGTHS]


def expected(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    model = oracle(folder)
    with torch.no_grad():
        # a model without attention has no KV length, which transformers' cache asks for
        return [model(torch.tensor([text]), use_cache=False).logits[0] for text in texts]


def run(
    model: Lfm2Model, texts: list[list[int]], sizes: list[int], padding: int
) -> list[torch.Tensor]:
    """All logits of ``texts``, computed together in spans of the repeating ``sizes``."""
    stepper = Stepper(model, len(texts), max(map(len, texts)), seed=len(sizes))
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    step = 0
    while any(at < len(text) for at, text in zip(stepper.lengths, texts, strict=True)):
        spans = []
        for i, text in enumerate(texts):
            at = stepper.lengths[i]
            # the sequences take their spans out of step with each other
            size = sizes[(step + i) % len(sizes)]
            if at < len(text) and size:
                spans.append((i, text[at : at + size]))
        for (i, _), logits in zip(spans, stepper.step(spans, padding=padding), strict=True):
            parts[i].append(logits)
        step += 1
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize(
    ("sizes", "padding"),
    [
        ([1000], 0),
        ([7, 1, 1, 40, 1, 5, 64], 3),
        # two steps of prefill, then decode steps, where a padding row is a row of one token too
        ([60, 60] + [1] * 200, 2),
    ],
    ids=["whole", "ragged", "decode"],
)
def test_fp32_logits(case: Path, sizes: list[int], padding: int) -> None:
    model = load_model(case, device="cpu")
    texts = prompts(model.config.vocab_size)
    for got, want in zip(run(model, texts, sizes, padding), expected(case, texts), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=FP32_BOUND)
