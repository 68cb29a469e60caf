"""The engine's greedy tokens against transformers, on random checkpoints of many shapes.

Sixteen ragged prompts are generated together; then transformers reads each prompt with its output
in one unpadded pass. If its argmax after every prefix is our next token, its own greedy generation
would have been the same token by token, and one pass costs a fraction of 64 steps.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm2_gpu.engine.config import EngineConfig
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.runner import Runner
from lfm2_gpu.loader import load_model
from tiny_engine import params

checkpoints = pytest.importorskip("checkpoints")
pytest.importorskip("transformers")

STEPS = 64
C, A = "conv", "full_attention"


def dense(**shape: Any) -> dict[str, Any]:
    return {"moe": False, **shape}


def moe(**shape: Any) -> dict[str, Any]:
    return {"moe": True, **shape}


SHAPES: dict[str, dict[str, Any]] = {
    "dense": dense(),
    "dense-flat-theta": dense(flat_theta=True, rope_parameters={"rope_theta": 5e5}),
    "dense-theta-1e7": dense(rope_parameters={"rope_theta": 1e7, "rope_type": "default"}),
    "dense-group-8": dense(hidden_size=256, num_attention_heads=8, num_key_value_heads=1),
    "dense-group-1": dense(hidden_size=128, num_attention_heads=4, num_key_value_heads=4),
    "dense-group-2-dim-64": dense(hidden_size=256, num_attention_heads=4, num_key_value_heads=2),
    "dense-dim-64": dense(hidden_size=320, num_attention_heads=5, num_key_value_heads=1),
    "dense-4-taps": dense(conv_L_cache=4),
    "dense-bias": dense(conv_bias=True),
    "dense-bias-4-taps": dense(conv_bias=True, conv_L_cache=4, hidden_size=160,
                               num_attention_heads=5),
    "dense-untied": dense(tie_word_embeddings=False),
    "dense-convs-first": dense(num_hidden_layers=6, layer_types=[C, C, C, A, C, A]),
    "dense-attention-last": dense(num_hidden_layers=5, layer_types=[C, A, C, A, A]),
    "dense-auto-ff": dense(block_auto_adjust_ff_dim=True, intermediate_size=512),
    "moe": moe(),
    "moe-4-experts-top-1": moe(num_experts=4, num_experts_per_tok=1),
    "moe-16-experts-top-4": moe(num_experts=16, num_experts_per_tok=4),
    "moe-top-3-scaled": moe(num_experts_per_tok=3, routed_scaling_factor=1.7),
    "moe-unnormalised": moe(norm_topk_prob=False),
    "moe-no-bias": moe(use_expert_bias=False),
    "moe-all-sparse": moe(num_dense_layers=0, hidden_size=128, num_attention_heads=4),
    "moe-group-3-dim-64": moe(hidden_size=192, num_attention_heads=3, num_key_value_heads=1),
    "moe-4-taps-bias": moe(conv_L_cache=4, conv_bias=True),
    "moe-untied-theta": moe(tie_word_embeddings=False, rope_parameters={"rope_theta": 5e6}),
    "moe-24b-like": moe(num_hidden_layers=8, layer_types=[C, C, A, C, C, C, A, C],
                        hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
                        num_experts=16, num_experts_per_tok=4, num_dense_layers=2),
}  # fmt: skip


def engine_of(folder: Path, **changes: int) -> Engine:
    model = load_model(folder, device="cpu", dtype=torch.float32, max_model_len=256)
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_pages": 64} | changes
    vocab = model.config.vocab_size
    return Engine(Runner(model, EngineConfig(max_model_len=256, vocab_size=vocab, **sizes)))


def ragged_prompts(vocab: int, count: int = 16) -> list[list[int]]:
    rng = random.Random(1)
    lengths = [1, 2, 3, 63, 64, 65, *(rng.randint(4, 100) for _ in range(count - 6))]
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    folder = checkpoints.build(tmp_path, seed=list(SHAPES).index(name), **SHAPES[name])
    engine = engine_of(folder)
    wanted = params(max_tokens=STEPS)
    many = ragged_prompts(engine.config.vocab_size)
    requests = [engine.add(str(i), p, wanted, seed=0)[0] for i, p in enumerate(many)]
    while engine.has_unfinished:
        engine.step()
    oracle = checkpoints.oracle(folder)
    distinct = 0
    for request in requests:
        tokens = torch.tensor([request.prompt + request.output])
        with torch.no_grad():
            logits = oracle(tokens).logits[0, len(request.prompt) - 1 : -1]
        assert request.output == logits.argmax(dim=-1).tolist()
        distinct += len(set(request.output))
    # a text that loops would not show a late mistake
    assert distinct > 16 * 12
