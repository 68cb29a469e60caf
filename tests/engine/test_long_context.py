"""The advertised context: a prompt that fills 32,768 positions, prefilled in chunks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lfm2_gpu.engine.config import EngineConfig
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.runner import Runner
from lfm2_gpu.loader import load_model
from tiny_engine import finish, params

checkpoints = pytest.importorskip("checkpoints")
pytest.importorskip("transformers")

LENGTH, CHECKED_FROM, CHUNK = 32_768, 32_000, 512


def test_the_last_positions_of_32k_are_transformers(tmp_path: Path) -> None:
    folder = checkpoints.build(
        tmp_path,
        seed=3,
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_attention_heads=2,
        max_position_embeddings=128_000,
    )
    model = load_model(folder, device="cpu", dtype=torch.float32)
    assert model.max_model_len == LENGTH
    config = EngineConfig(
        max_model_len=LENGTH,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
        num_pages=LENGTH // 64,
        vocab_size=64,
    )
    engine = Engine(Runner(model, config))
    rng = random.Random(0)
    prompt = [rng.randrange(64) for _ in range(LENGTH - 8)]
    (request,) = engine.add("a", prompt, params(prompt_logprobs=0, max_tokens=None), seed=0)
    finish(engine)
    assert engine.num_steps == LENGTH // CHUNK + 7
    assert request.num_tokens == LENGTH

    tokens = torch.tensor([prompt + request.output])
    want = _transformers_logprobs(folder, tokens)
    got = torch.tensor([e.logprob for e in request.prompt_logprobs[CHECKED_FROM:]])
    picked = want[: len(got)].gather(1, tokens[0, CHECKED_FROM + 1 : LENGTH - 8, None])[:, 0]
    # two fp32 sums of 32,768 terms in different order; logits are of order 1
    torch.testing.assert_close(got, picked, rtol=0, atol=4e-5)
    assert want[len(got) : -1].argmax(dim=1).tolist() == request.output


def _transformers_logprobs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after the positions ``CHECKED_FROM`` and later."""
    oracle = checkpoints.oracle(folder)
    cache, parts = None, []
    with torch.no_grad():
        for start in range(0, LENGTH, CHUNK):
            chunk = tokens[:, start : start + CHUNK]
            out = oracle(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            first = max(CHECKED_FROM - start, 0)
            parts.append(out.logits[0, first:].log_softmax(dim=-1) if first < CHUNK else None)
    return torch.cat([part for part in parts if part is not None])
