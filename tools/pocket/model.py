"""The pocket model's shape, its router balancing, and its export in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.lfm2_moe.modeling_lfm2_moe import (
    Lfm2MoeExperts,
    Lfm2MoeSparseMoeBlock,
)

from .tokenizer import BOS_ID, EOT_ID, IM_END_ID, PAD_ID, VOCAB_SIZE

BIAS_STEP = 2e-3
# experts' token counts are padded to this multiple while training, see _padded_experts
COUNT_MULTIPLE = 64
# the sampling that the checkpoint ships with, chosen on prompts that the evaluation does not use
GENERATION = {"do_sample": True, "temperature": 0.7, "min_p": 0.15, "repetition_penalty": 1.15}


def config() -> Lfm2MoeConfig:
    """Return the configuration: 7.81 M parameters, every inner size a multiple of 64."""
    return Lfm2MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=192,
        num_hidden_layers=6,
        num_dense_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        use_expert_bias=True,
        routed_scaling_factor=1.0,
        layer_types=["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
        conv_L_cache=3,
        conv_bias=False,
        norm_eps=1e-5,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=BOS_ID,
        eos_token_id=IM_END_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
    )


def build(seed: int, weights: Path | None = None) -> Lfm2MoeForCausalLM:
    """Return a model in float32, freshly initialised or from a checkpoint, ready to train."""
    torch.manual_seed(seed)
    if weights is not None:
        model = Lfm2MoeForCausalLM.from_pretrained(weights, dtype=torch.float32)
    else:
        model = Lfm2MoeForCausalLM(config())
        for block in moe_blocks(model):
            nn.init.normal_(block.gate.weight, std=model.config.initializer_range)
    ALL_EXPERTS_FUNCTIONS.register("padded", _padded_experts)
    model.set_experts_implementation("padded")
    return model


def _padded_experts(
    module: Lfm2MoeExperts,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run the experts as transformers' eager loop does, with padded token counts.

    oneDNN compiles a matrix product for every new shape, which takes longer than the product.
    Padding each expert's tokens to a multiple of ``COUNT_MULTIPLE`` leaves few shapes (measured on
    one core with AMX: 2,150 tokens/s without, 3,900 with).

    Args:
        module: transformers' ``Lfm2MoeExperts``.
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` expert ids.
        top_k_weights: ``[T, k]``.
    """
    tokens = hidden.shape[0]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    source = torch.cat((hidden, hidden.new_zeros(1, hidden.shape[1]))).to(dtype)
    out = torch.zeros_like(source, dtype=torch.float32)
    gate_up = module.gate_up_proj.to(dtype).unbind(0)
    down = module.down_proj.to(dtype).unbind(0)
    for expert in range(module.num_experts):
        rows, slots = torch.where(top_k_index == expert)
        extra = -len(rows) % COUNT_MULTIPLE
        weight = functional.pad(top_k_weights[rows, slots], (0, extra))
        rows = functional.pad(rows, (0, extra), value=tokens)
        gate, up = functional.linear(source[rows], gate_up[expert]).chunk(2, dim=-1)
        said = functional.linear(functional.silu(gate) * up, down[expert])
        out = out.index_add(0, rows, (said * weight[:, None].to(dtype)).float())
    return out[:tokens].to(hidden.dtype)


def moe_blocks(model: nn.Module) -> list[Lfm2MoeSparseMoeBlock]:
    """Return the sparse feed-forward blocks in layer order."""
    return [m for m in model.modules() if isinstance(m, Lfm2MoeSparseMoeBlock)]


class RouterBalance:
    """Count the load of every expert and move ``expert_bias`` against it.

    ``expert_bias`` is a buffer and gets no gradient. After a step it moves by ``BIAS_STEP`` times
    the sign of (mean load - load), as in Wang et al. 2024, https://arxiv.org/abs/2408.15664.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook the routers of a model.

        Args:
            model: whose MoE blocks are watched.
        """
        self._blocks = moe_blocks(model)
        experts = self._blocks[0].gate.num_experts
        self.loads = torch.zeros(len(self._blocks), experts)
        self.counted: torch.Tensor | None = None
        for i, block in enumerate(self._blocks):
            block.gate.register_forward_hook(self._hook(i))

    def _hook(self, index: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            selected = outputs[2]
            if self.counted is not None:
                selected = selected[self.counted]
            self.loads[index] += torch.bincount(selected.flatten(), minlength=self.loads.shape[1])

        return count

    def step(self) -> torch.Tensor:
        """Move the biases, reset the counts, return the loads as shares of a fair share."""
        mean = self.loads.mean(dim=1, keepdim=True)
        for block, delta in zip(self._blocks, torch.sign(mean - self.loads), strict=True):
            block.expert_bias.add_(delta, alpha=BIAS_STEP)
        shares = self.loads / mean.clamp_min(1)
        self.loads = torch.zeros_like(self.loads)
        return shares


def export(model: Lfm2MoeForCausalLM, folder: Path) -> None:
    """Write ``model.safetensors`` (bfloat16, expert_bias float32) and the two config files.

    transformers writes the file itself, with one tensor per expert; the cast follows on the file,
    so that the model in memory keeps its precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        name: (tensor.float() if name.endswith("expert_bias") else tensor.bfloat16()).contiguous()
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    saved = json.loads((folder / "config.json").read_text("utf-8"))
    saved["dtype"] = "bfloat16"
    saved.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", "utf-8")
    # a dialogue ends its turn, prose its unit
    ends = [IM_END_ID, EOT_ID]
    ids = {"bos_token_id": BOS_ID, "eos_token_id": ends, "pad_token_id": PAD_ID}
    generation = json.dumps({**ids, **GENERATION}, indent=2)
    (folder / "generation_config.json").write_text(generation + "\n", "utf-8")
