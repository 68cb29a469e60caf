"""A small random LFM2-MoE in an engine, without files, tokenizer or transformers."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch

from lfm2_gpu.api import SamplingDefaults, SamplingParams
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.engine.config import EngineConfig
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.request import Request
from lfm2_gpu.engine.runner import Runner
from lfm2_gpu.loader import random_model
from lfm2_gpu.model.lfm2 import Lfm2Model

VOCAB = 310
EOS = 7

CONFIG = ModelConfig(
    architecture="lfm2_moe",
    # ten rows of padding behind the vocabulary
    vocab_size=VOCAB + 10,
    hidden_size=96,
    num_hidden_layers=6,
    layer_types=("conv", "conv", "full_attention", "conv", "full_attention", "conv"),
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=160,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    num_dense_layers=2,
    max_position_embeddings=512,
    dtype="float32",
    eos_token_ids=(EOS,),
)


@functools.cache
def tiny_model() -> Lfm2Model:
    """Random, and with gains that let its state decide its tokens (``test_engine`` gates that)."""
    model = random_model(CONFIG, device="cpu", dtype=torch.float32, seed=1)
    gains = {"embedding": 1 / 3, "q_norm": 1.7, "k_norm": 1.7, "conv": 1.7, "gate": 1.0}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            leaf = name.rpartition(".")[2]
            tensor *= gains.get(leaf, 1.3 if tensor.ndim > 1 else 1.0)
            if leaf == "out_proj" and name.replace(leaf, "qkv") in model.state_dict():
                tensor *= 2.3
    return model


def tiny_engine(
    model: Lfm2Model | None = None, *, unused_ids: tuple[int, ...] = (), **changes: int
) -> Engine:
    sizes = {
        "max_model_len": 400,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 256,
        "num_pages": 400,
        "vocab_size": VOCAB,
    }
    config = EngineConfig(**(sizes | changes), eos_token_ids=(EOS,), unused_ids=unused_ids)
    return Engine(Runner(model or tiny_model(), config))


def params(**fields: object) -> SamplingParams:
    """Greedy unless told otherwise, and never ended by the model's end token."""
    greedy: dict[str, object] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24}
    return SamplingParams(**(greedy | fields)).with_defaults(SamplingDefaults())  # type: ignore[arg-type]


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def finish(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


def run(
    many: Sequence[Sequence[int]], wanted: SamplingParams, **changes: int
) -> tuple[list[Request], Engine]:
    """All first choices of ``many`` prompts, run together to their end, seeded by their place."""
    engine = tiny_engine(**changes)
    requests = [engine.add(str(i), p, wanted, seed=i)[0] for i, p in enumerate(many)]
    finish(engine)
    return requests, engine


def outputs(
    many: Sequence[Sequence[int]], wanted: SamplingParams, **changes: int
) -> list[list[int]]:
    return [r.output for r in run(many, wanted, **changes)[0]]
