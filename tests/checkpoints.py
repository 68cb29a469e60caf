"""Tiny random checkpoints, saved by transformers, whose outputs are sensitive to their state.

With embeddings of unit scale a tied model repeats its input, and a test on it would not see most
faults in conv rings or KV pages. Here the embedding is small and everything else keeps the scale of
what passes through it, so that mixers and experts decide the next token; ``stepper.blind_spots``
checks that they do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["build", "edit_config", "oracle"]

# found by trying: 117 of 120 single faults change 32 greedy tokens, and no text falls into a loop
_EMBEDDING_SCALE = 0.1
_ATTENTION_NORM = 1.7
_GAIN = 1.3
_ATTENTION_OUT_GAIN = 3.0
_DENSE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "full_attention", "conv"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_dense_layers": 1,
}


def build(
    folder: Path,
    seed: int = 0,
    *,
    moe: bool = False,
    dtype: torch.dtype = torch.float32,
    flat_theta: bool = False,
    save_options: dict[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """Save a random LFM2 checkpoint in ``folder`` and return it.

    Args:
        folder: Made if missing.
        seed: Of all weights.
        moe: LFM2-MoE instead of dense LFM2.
        dtype: On disk; expert biases stay fp32.
        flat_theta: Write the RoPE base as transformers 4 did, not nested.
        save_options: Passed to ``save_pretrained``: shard sizes, or the experts' layout.
        shape: Fields of transformers' config over small defaults. In a dense model
            ``intermediate_size`` is literal unless ``block_auto_adjust_ff_dim`` is given.
    """
    from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2MoeConfig

    fields = {**_DENSE, **(_EXPERTS if moe else {"block_auto_adjust_ff_dim": False}), **shape}
    if "layer_types" not in shape:
        count = fields["num_hidden_layers"]
        fields["layer_types"] = (_DENSE["layer_types"] * count)[:count]
    config = (Lfm2MoeConfig if moe else Lfm2Config)(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    fill(model, seed)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")}
    model.to(dtype)
    for name, bias in biases.items():
        model.get_buffer(name).data = bias
    model.config.dtype = dtype
    model.save_pretrained(folder, **(save_options or {}))
    if flat_theta:
        edit_config(folder, rope_theta=config.rope_parameters["rope_theta"], rope_parameters=None)
    return folder


def fill(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter and expert bias anew, from its name's kind and its fan-in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors.update((n, b) for n, b in model.named_buffers() if n.endswith("expert_bias"))
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            if "norm" in name:
                mean = _ATTENTION_NORM if "layernorm" in name else 1.0
                tensor.normal_(mean, 0.2, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                # logits of the same scale whatever the width, since bounds on them are absolute
                scale = _EMBEDDING_SCALE * (_DENSE["hidden_size"] / tensor.shape[1]) ** 0.5
                tensor.normal_(0.0, scale, generator=generator)
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("conv.conv.weight"):
                tensor.normal_(0.0, 1.0, generator=generator)
            else:
                gain = _ATTENTION_OUT_GAIN if "self_attn.out_proj" in name else _GAIN
                tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5, generator=generator)


def edit_config(folder: Path, **changes: Any) -> None:
    """Rewrite keys of config.json; ``None`` removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers runs it, in the form that parity is measured against."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        **(
            {"experts_implementation": "eager"}
            if "num_experts" in (folder / "config.json").read_text()
            else {}
        ),
    )
    return model.eval()
