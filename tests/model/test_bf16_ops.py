"""Each op rounds where transformers does: fed with its own bf16 activations, one by one.

Whole-model parity cannot show this, and fp32 parity not at all. All ops but two reproduce
transformers' bits. Attention keeps scores and probabilities in fp32 where eager attention rounds
them, and the experts' outputs are summed in fp32 where the eager loop rounds each partial sum:
their bounds are derived in docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lfm2_kernels as ops
from checkpoints import build, oracle
from lfm2_gpu.loader import load_model
from lfm2_gpu.model.layers import Attention, DenseFFN, ShortConv, SparseMoE
from lfm2_gpu.model.lfm2 import Lfm2Model

# half the distance of 1 and the next bf16
U = 2.0**-8
TOKENS = 150
CASES: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    | {"conv_L_cache": 4},
    "moe": {"moe": True, "conv_bias": True, "num_experts_per_tok": 4, "num_experts": 16}
    | {"hidden_size": 160, "num_attention_heads": 5, "head_dim": 64},
    "moe-plain": {"moe": True, "use_expert_bias": False, "norm_topk_prob": False}
    | {"routed_scaling_factor": 1.7, "num_experts_per_tok": 3},
}


@dataclass
class Recording:
    """Inputs and outputs of every module of a transformers model, and of eager attention."""

    model: Lfm2Model
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, Any]
    attention: list[tuple[torch.Tensor, ...]]

    def layers(self, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
        """Prefix and sublayer of each layer with a sublayer of ``kind``."""
        for i, layer in enumerate(self.model.layers):
            for part in (layer.mixer, layer.ffn):
                if isinstance(part, kind):
                    yield f"model.layers.{i}", part

    def after(self, prefix: str) -> torch.Tensor:
        """The residual stream after a layer."""
        following = f"model.layers.{int(prefix.rpartition('.')[2]) + 1}.operator_norm"
        return self.inputs.get(following, self.inputs["model.embedding_norm"])


@pytest.fixture(scope="module", params=CASES)
def recording(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Recording:
    folder = build(tmp_path_factory.mktemp("bf16"), 3, dtype=torch.bfloat16, **CASES[request.param])
    theirs = oracle(folder, torch.bfloat16)
    found = Recording(load_model(folder, device="cpu"), {}, {}, [])
    for name, module in theirs.named_modules():

        def record(_: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if args and args[0].is_floating_point():
                found.inputs[name] = args[0].flatten(0, -2)
            found.outputs[name] = output

        module.register_forward_hook(record)
    modeling = __import__(type(theirs).__module__, fromlist=["eager_attention_forward"])
    eager = modeling.eager_attention_forward

    def spy(module: nn.Module, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        out = eager(module, q, k, v, *args, **kwargs)
        found.attention.append((q[0], k[0], v[0], out[0][0]))
        return out

    ids = torch.randint(found.model.config.vocab_size, (1, TOKENS))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling, "eager_attention_forward", spy)
        theirs(ids, use_cache=False)
    return found


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.reshape(got.shape), rtol=0, atol=0)


def one_row(first: int = 0) -> dict[str, torch.Tensor]:
    """Batch metadata of one sequence on slot 1."""
    return {
        "positions": torch.arange(first, TOKENS, dtype=torch.int32),
        "token_rows": torch.zeros(TOKENS - first, dtype=torch.int32),
        "slots": torch.tensor([1], dtype=torch.int32),
    }


def test_embedding_norms_and_head(recording: Recording) -> None:
    model, inputs, outputs = recording.model, recording.inputs, recording.outputs
    eps = model.config.norm_eps
    x = inputs["model.embedding_norm"]
    same(ops.rmsnorm(x, model.norm, eps), outputs["model.embedding_norm"])
    same(ops.linear(x, model.head, norm_weight=model.norm, eps=eps), outputs["lm_head"])
    for i, layer in enumerate(model.layers):
        for name, part in (("operator_norm", layer.mixer), ("ffn_norm", layer.ffn)):
            name = f"model.layers.{i}.{name}"
            same(ops.rmsnorm(inputs[name], part.norm, eps), outputs[name])


def test_short_conv(recording: Recording) -> None:
    for prefix, part in recording.layers(ShortConv):
        x = recording.inputs[f"{prefix}.operator_norm"]
        bcx = ops.linear(x, part.in_proj, bias=part.in_bias, norm_weight=part.norm, eps=part.eps)
        same(bcx, recording.outputs[f"{prefix}.conv.in_proj"])
        taps = part.conv.shape[1]
        state = torch.full((2, taps, x.shape[1]), torch.nan, dtype=x.dtype)
        meta = {**one_row(), "first_computed": torch.zeros(2, dtype=torch.int32)}
        y = ops.short_conv_prefill(
            bcx,
            part.conv,
            state,
            query_start_loc=torch.tensor([0, TOKENS], dtype=torch.int32),
            bias=part.conv_bias,
            **meta,
        )
        same(y, recording.inputs[f"{prefix}.conv.out_proj"])
        out = ops.linear(y, part.out_proj, bias=part.out_bias, residual=x)
        same(out, recording.inputs[f"{prefix}.ffn_norm"])


def test_attention(recording: Recording) -> None:
    config = recording.model.config
    for (prefix, part), (q_want, k_want, v_want, out_want) in zip(
        recording.layers(Attention), recording.attention, strict=True
    ):
        x = recording.inputs[f"{prefix}.operator_norm"]
        qkv = ops.linear(x, part.qkv, norm_weight=part.norm, eps=part.eps)
        projected = [recording.outputs[f"{prefix}.self_attn.{n}_proj"][0] for n in "qkv"]
        same(qkv, torch.cat(projected, dim=-1))
        shape = (4, 2, config.num_key_value_heads, 64, config.head_dim)
        pages = torch.full(shape, torch.nan, dtype=x.dtype)
        table = torch.tensor([[0, 0, 0], [2, 1, 3]], dtype=torch.int32)
        q = ops.qk_norm_rope(
            qkv,
            part.q_norm,
            part.k_norm,
            part.rope,
            pages,
            eps=part.eps,
            page_table=table,
            kv_write_from=torch.zeros(2, dtype=torch.int32),
            **one_row(),
        )
        same(q, q_want.transpose(0, 1))
        held = pages[[2, 1, 3]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :TOKENS]
        same(held[0], k_want)
        same(held[1], v_want)
        out = ops.attention_prefill(
            q,
            pages,
            table,
            positions=one_row()["positions"],
            query_start_loc=torch.tensor([0, TOKENS], dtype=torch.int32),
            slots=torch.tensor([1], dtype=torch.int32),
            scale=part.scale,
        )
        off = (out.float() - out_want.float()).abs().transpose(0, 1)
        assert bool((off <= attention_bound(q_want, k_want, v_want, part.scale)).all())
        y = ops.linear(out_want.flatten(1), part.out_proj, residual=x)
        same(y, recording.inputs[f"{prefix}.ffn_norm"])


def attention_bound(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """How far eager attention may be from attention in fp32, ``[heads, T, head_dim]``.

    Two roundings of each score move it by at most 2 U |s|, so no probability by more than a factor
    exp(4 U max|s|); rounding it adds U, and each side rounds its result.
    """
    group = q.shape[0] // k.shape[0]
    k, v = (t.float().repeat_interleave(group, dim=0) for t in (k, v))
    scores = q.float() @ k.transpose(1, 2) * scale
    hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
    largest = scores.abs().masked_fill(hidden, 0).amax(-1, keepdim=True)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (torch.expm1(4 * U * largest) + 3 * U) * (weights @ v.abs())


def test_dense_ffn(recording: Recording) -> None:
    for prefix, part in recording.layers(DenseFFN):
        x, outputs = recording.inputs[f"{prefix}.ffn_norm"], recording.outputs
        gate_up = ops.linear(x, part.w13, norm_weight=part.norm, eps=part.eps)
        halves = [outputs[f"{prefix}.feed_forward.{name}"][0] for name in ("w1", "w3")]
        same(gate_up, torch.cat(halves, dim=-1))
        act = ops.swiglu(gate_up)
        same(act, recording.inputs[f"{prefix}.feed_forward.w2"])
        same(ops.linear(act, part.w2, residual=x), recording.after(prefix))


def test_router(recording: Recording) -> None:
    for prefix, part in recording.layers(SparseMoE):
        h = recording.outputs[f"{prefix}.ffn_norm"][0]
        logits, weights, ids = recording.outputs[f"{prefix}.feed_forward.gate"]
        same(ops.linear(h, part.gate), logits)
        got, chosen = ops.route(
            logits,
            part.expert_bias,
            top_k=part.top_k,
            norm_topk_prob=part.norm_topk_prob,
            scaling=part.scaling,
        )
        ours, theirs = chosen.long().sort(dim=-1), ids.sort(dim=-1)
        # which of two equal scores is taken is open in torch.topk; a bias in fp32 leaves none equal
        biased = logits.sigmoid() if part.expert_bias is None else logits + part.expert_bias
        clear = (biased.sort(dim=-1).values.diff() != 0).all(dim=-1)
        assert clear.float().mean() > 0.5
        assert torch.equal(ours.values[clear], theirs.values[clear])
        same(got.gather(1, ours.indices)[clear], weights.gather(1, theirs.indices)[clear])


def test_experts(recording: Recording) -> None:
    for prefix, part in recording.layers(SparseMoE):
        h = recording.outputs[f"{prefix}.ffn_norm"][0]
        _, weights, ids = recording.outputs[f"{prefix}.feed_forward.gate"]
        want = recording.outputs[f"{prefix}.feed_forward.experts"].float()
        ids = ids.to(torch.int32)
        order, offsets = ops.sort_tokens(ids, part.w13.shape[0])
        act = ops.grouped_swiglu(h, part.w13, order, offsets, top_k=part.top_k)
        parts = ops.grouped_linear(act, part.w2, order, offsets, weights)
        total = parts.float().view(TOKENS, part.top_k, -1).abs().sum(dim=1)
        got = ops.moe(h, part.w13, part.w2, weights, ids, residual=torch.zeros_like(h)).float()
        # k - 1 partial sums round there, the sum once here
        assert bool(((got - want).abs() <= part.top_k * U * total).all())
        x = recording.inputs[f"{prefix}.ffn_norm"]
        same(ops.moe(h, part.w13, part.w2, weights, ids, residual=x), x + got.bfloat16())
