"""Checkpoint names to parameters: every layout, every prefix, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.model.lfm2 import Lfm2Model
from lfm2_gpu.model.weights import (
    CLASSES,
    copy_rows,
    expected_tensors,
    fit_ff_size,
    place_tensors,
)

Tensors = dict[str, tuple[str, tuple[int, ...]]]

DENSE = ModelConfig(
    architecture="lfm2",
    vocab_size=20,
    hidden_size=12,
    num_hidden_layers=3,
    layer_types=("conv", "full_attention", "conv"),
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=10,
)
MOE = replace(
    DENSE,
    architecture="lfm2_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    num_dense_layers=1,
    conv_bias=True,
    tie_word_embeddings=False,
    eos_token_ids=(7,),
)


def tensors(config: ModelConfig, prefix: str = "model.", fused: bool = False) -> Tensors:
    return {
        name if name == "lm_head.weight" else prefix + name: ("BF16", place.shape)
        for name, place in expected_tensors(config, fused_experts=fused)
    }


def refused(held: Tensors, message: str, config: ModelConfig = MOE) -> None:
    with pytest.raises(ModelFileError, match=f"here: .*{message}"):
        place_tensors(config, held, "here")


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_is_filled_exactly_once(config: ModelConfig, fused: bool) -> None:
    model = Lfm2Model(config, torch.float32, "cpu")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.zero_()
    placed = place_tensors(config, tensors(config, fused=fused), "here")
    for place in placed.values():
        ones = torch.ones(place.shape)
        for start in range(0, place.shape[0], 3):
            target = parameters[place.target]
            before = target.clone()
            copy_rows(target, place, start, 1 + before.amax() + ones[start : start + 3])
            # adds nothing to what another tensor has filled
            assert bool((before[before != target] == 0).all())
    assert all(bool((parameter > 0).all()) for parameter in parameters.values())


def test_rows_go_where_they_belong() -> None:
    model = Lfm2Model(MOE, torch.float32, "cpu")
    parameters = dict(model.named_parameters())
    placed = place_tensors(MOE, tensors(MOE), "here")
    held = {name: torch.randn(place.shape) for name, place in placed.items()}
    for name, place in placed.items():
        copy_rows(parameters[place.target], place, 0, held[name])
    base = "model.layers.1."
    attention, moe = model.layers[1].mixer, model.layers[1].ffn
    qkv = [held[f"{base}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(attention.qkv, torch.cat(qkv))
    experts = f"{base}feed_forward.experts."
    for e in range(4):
        w1, w3 = held[f"{experts}{e}.w1.weight"], held[f"{experts}{e}.w3.weight"]
        assert torch.equal(moe.w13[e], torch.cat([w1, w3]))
        assert torch.equal(moe.w2[e], held[f"{experts}{e}.w2.weight"])
    assert torch.equal(model.layers[0].mixer.conv, held["model.layers.0.conv.conv.weight"][:, 0])
    assert torch.equal(model.head, held["lm_head.weight"])


def test_expert_bias_is_fp32_in_a_16_bit_model() -> None:
    model = Lfm2Model(MOE, torch.bfloat16, "cpu")
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert dtypes.pop("layers.1.ffn.expert_bias") == torch.float32
    assert dtypes.pop("layers.2.ffn.expert_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_tied_head_is_the_embedding() -> None:
    model = Lfm2Model(DENSE, torch.float32, "cpu")
    assert model.head is model.embedding
    assert "head" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "prefix", ["model.", "", "language_model.model.", "model.language_model.", "lfm."]
)
def test_prefixes(prefix: str) -> None:
    placed = place_tensors(MOE, tensors(MOE, prefix), "here")
    assert placed[f"{prefix}embedding_norm.weight"].target == "norm"
    assert placed["lm_head.weight"].target == "head"


def test_a_head_beside_tied_embeddings_has_no_place() -> None:
    held = {**tensors(DENSE), "lm_head.weight": ("BF16", (20, 12))}
    assert "lm_head.weight" not in place_tensors(DENSE, held, "here")


def test_parameter_bytes() -> None:
    total = Lfm2Model(MOE, torch.bfloat16, "cpu").parameter_bytes()
    assert tuple(total) == CLASSES
    assert total["embedding"] == 2 * 2 * 20 * 12
    assert total["experts"] == 2 * 2 * 4 * 3 * 6 * 12
    # the gate in bf16, the bias in fp32, of two layers
    assert total["router"] == 2 * (2 * 4 * 12 + 4 * 4)
    assert total["norms"] == 2 * (7 * 12 + 2 * 16)
    assert sum(total.values()) == 2 * MOE.num_parameters + 2 * 2 * 4


def test_missing_tensors() -> None:
    held = tensors(MOE)
    del held["model.layers.1.feed_forward.experts.3.w2.weight"], held["lm_head.weight"]
    refused(held, r"lm_head.weight is missing; .*experts.3.w2.weight is missing$")
    del held["model.embed_tokens.weight"]
    refused(held, "model.embed_tokens.weight is missing")


def test_leftover_tensors() -> None:
    held = {**tensors(MOE), "model.layers.3.ffn_norm.weight": ("BF16", (12,))}
    refused(held, r"model.layers.3.ffn_norm.weight \[12\] is not part of the model")
    refused({**tensors(MOE), "vision.proj": ("BF16", (1,))}, r"vision.proj \[1\] is not part")


def test_duplicated_tensors() -> None:
    refused(
        {**tensors(MOE), "embed_tokens.weight": ("BF16", (20, 12))},
        "model.embed_tokens.weight and embed_tokens.weight are the same tensor twice",
    )
    both = {**tensors(MOE, fused=True), **tensors(MOE)}
    refused(both, r"experts.0.w1.weight \[6, 12\] is not part of the model")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (12, 13)),
        ("model.layers.0.conv.in_proj.weight", (12, 36)),
        # the layout of MLX
        ("model.layers.0.conv.conv.weight", (12, 3, 1)),
        ("model.embed_tokens.weight", (21, 12)),
        ("model.layers.1.feed_forward.expert_bias", (5,)),
    ],
)
def test_misshaped_tensors(name: str, shape: tuple[int, ...]) -> None:
    held = tensors(MOE)
    want = list(held[name][1])
    held[name] = ("BF16", shape)
    got, wanted = (str(list(s)).replace("[", r"\[") for s in (shape, want))
    refused(held, f"{name} is {got}, want {wanted}")


def test_other_dtypes_are_refused() -> None:
    held = tensors(MOE)
    held["model.embedding_norm.weight"] = ("F8_E4M3", (12,))
    refused(held, "model.embedding_norm.weight is F8_E4M3, want BF16, F16, F32")


def test_many_problems_are_counted() -> None:
    with pytest.raises(ModelFileError, match=r"conv.bias is missing; and 49 more$"):
        place_tensors(MOE, {"model.embed_tokens.weight": ("BF16", (20, 12))}, "here")


def test_ff_size_is_the_tensors(caplog: pytest.LogCaptureFixture) -> None:
    stated = replace(DENSE, intermediate_size=16)
    shapes = {name: shape for name, (_, shape) in tensors(DENSE).items()}
    assert fit_ff_size(stated, shapes) == DENSE
    assert "the config's FFN size is 16, the tensors' 10, which is used" in caplog.text


def test_ff_size_is_the_configs_when_the_tensors_disagree() -> None:
    shapes = {name: shape for name, (_, shape) in tensors(DENSE).items()}
    shapes["model.layers.1.feed_forward.w1.weight"] = (9, 12)
    assert fit_ff_size(DENSE, shapes) is DENSE
    moe = {name: shape for name, (_, shape) in tensors(MOE).items()}
    assert fit_ff_size(replace(MOE, intermediate_size=11), moe).intermediate_size == 11
