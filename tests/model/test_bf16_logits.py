"""bf16 logits against transformers, within the error that the roundings of the graph explain.

``rounding_error`` carries the relative error of the residual stream from layer to layer, with the
gains and rounding counts that docs/numerics.md derives. Our logits and transformers' must each be
within it of the same weights' fp32 logits, and of each other: they round at the same points but for
attention and the sum over experts.

A router in bf16 is a step function: an expert chosen differently is no rounding error. The MoE
cases take transformers' choices, and check that ours differ only where two scores nearly tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lfm2_kernels as ops
from checkpoints import build, oracle
from lfm2_gpu.loader import load_model
from stepper import Stepper

# root mean square of a bf16 rounding error, relative to a value with a random mantissa
U_RMS = 2.0**-7 / 12**0.5 * (0.75 / (2 * 0.6931)) ** 0.5
# the estimate takes every rounding as independent and every token as average
SPREAD = 1.5
TOKENS = 133
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-deep": {"num_hidden_layers": 8},
    "dense-320-head64": {"hidden_size": 320, "num_attention_heads": 5, "head_dim": 64},
    "dense-bias-untied": {"conv_bias": True, "tie_word_embeddings": False, "conv_L_cache": 4},
    "dense-conv-only": {"num_hidden_layers": 4, "layer_types": ["conv"] * 4},
    "moe": {"moe": True},
    "moe-top4": {"moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "moe-deep": {"moe": True, "num_hidden_layers": 8},
}


@torch.no_grad()
def rounding_error(
    model: Any, ids: torch.Tensor, choices: Iterator[tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, float]:
    """Logits of an fp32 model given its experts, and the rms error that they would have in bf16."""
    power: dict[tuple[int, str], float] = {}
    layers = model.model.layers

    def measure(key: tuple[int, str]) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            power[key] = float(value.square().mean())
            if key[1].endswith("norm"):
                power[key] = float(args[0].square().mean())

        return hook

    for i, layer in enumerate(layers):
        mixer = layer.self_attn if layer.is_attention_layer else layer.conv
        layer.operator_norm.register_forward_hook(measure((i, "norm")))
        mixer.register_forward_hook(measure((i, "mixer")))
        layer.ffn_norm.register_forward_hook(measure((i, "ffn norm")))
        layer.feed_forward.register_forward_hook(measure((i, "ffn")))
        if hasattr(layer.feed_forward, "gate"):

            def choose(_: nn.Module, args: Any, output: Any) -> Any:
                logits, weights, chosen = next(choices)
                return logits.float(), weights.float(), chosen

            layer.feed_forward.gate.register_forward_hook(choose)
    model.model.embedding_norm.register_forward_hook(measure((len(layers), "norm")))
    logits = model(ids, use_cache=False).logits[0]
    error = 0.0
    for i, layer in enumerate(layers):
        if layer.is_attention_layer:
            q, k = layer.self_attn.q_layernorm.weight, layer.self_attn.k_layernorm.weight
            # variance of a score: q and k have unit variance before their weights
            variance = float((q.square() * k.square()).mean())
            gain, roundings = 1 + 2 * variance, 6 + 18 * variance
        else:
            gain, roundings = 3.0, 13.0
        after = power[i, "ffn norm"]
        mixed = power[i, "mixer"] * (roundings * U_RMS**2 + gain * error)
        error = (power[i, "norm"] * error + mixed) / after + U_RMS**2
        sparse = hasattr(layer.feed_forward, "gate")
        gain, roundings = (3.0, 20.0) if sparse else (2.5, 10.5)
        fed = power[i, "ffn"] * (roundings * U_RMS**2 + gain * error)
        error = (after * error + fed) / power[i + 1, "norm"] + U_RMS**2
    error += 3 * U_RMS**2
    return logits, SPREAD * error**0.5 * float(logits.square().mean().sqrt())


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES[request.param]
    return build(tmp_path_factory.mktemp("bf16"), 3, dtype=torch.bfloat16, **case)


def test_bf16_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder, device="cpu")
    assert model.dtype == torch.bfloat16
    ids = torch.randint(model.config.vocab_size, (1, TOKENS))
    theirs = oracle(folder, torch.bfloat16)
    gates: list[tuple[torch.Tensor, ...]] = []
    for name, module in theirs.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _, args, output: gates.append(output))
    with torch.no_grad():
        want = theirs(ids, use_cache=False).logits[0].float()
    exact, bound = rounding_error(oracle(folder), ids, iter(gates))
    route, waiting = ops.route, iter(gates)

    def follow(logits: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> Any:
        """Check our choice of experts, then go on with transformers'."""
        _, chosen = route(logits, bias, **options)
        their_logits, weights, their_ids = next(waiting)
        ours, others = ((x.sigmoid().float() + bias) for x in (logits, their_logits))
        moved = 2 * (ours - others).abs().amax(-1)
        lowest = ours.gather(1, chosen.long()).amin(-1)
        # an expert that only they chose cannot beat ours by more than the scores moved
        assert bool((lowest - ours.gather(1, their_ids).amin(-1) <= moved).all())
        return weights, their_ids.to(torch.int32)

    monkeypatch.setattr(ops, "route", follow)
    got = Stepper(model, 1, TOKENS).step([(0, ids[0].tolist())])[0]
    assert got.dtype == torch.bfloat16
    assert next(waiting, None) is None
    for a, b in ((got, exact), (want, exact), (got, want)):
        off = (a.float() - b.float()).abs()
        assert float(off.square().mean().sqrt()) <= bound
        # of 17,000 Gaussian values the largest is 4.3; tokens differ in sensitivity
        assert float(off.max()) <= 6 * bound
    if model.config.num_attention_layers == 0 and model.config.num_experts == 0:
        # every op of a dense conv model reproduces transformers' bits
        assert torch.equal(got.float(), want)
