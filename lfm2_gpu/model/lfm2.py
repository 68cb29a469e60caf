"""The model graph: embed, per layer a mixer and an FFN, the final norm, the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lfm2_kernels as ops
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.model.batch import ForwardBatch
from lfm2_gpu.model.layers import Attention, DenseFFN, ShortConv, SparseMoE, parameter
from lfm2_gpu.model.weights import CLASSES, expected_tensors

__all__ = ["Lfm2Model"]


class Layer(nn.Module):
    """A mixer (short convolution or attention) and an FFN (dense or sparse), each with its norm."""

    def __init__(self, mixer: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.mixer, self.ffn = mixer, ffn

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Advance the residual stream ``[N, hidden]`` by one layer."""
        out: torch.Tensor = self.ffn(self.mixer(x, batch), batch)
        return out


class Lfm2Model(nn.Module):
    """LFM2 or LFM2-MoE on one device. Keeps no state between steps: that is in the batch's pools.

    Attributes:
        config: The shape.
        dtype: Of weights, activations and logits; expert biases are fp32.
        device: Where everything lives.
        max_model_len: Positions in the RoPE table; no token may lie beyond.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        max_model_len: int | None = None,
    ) -> None:
        """Allocate uninitialised parameters.

        Args:
            config: The shape.
            dtype: float32, float16 or bfloat16.
            device: Where to allocate. ``meta`` allocates nothing.
            max_model_len: Longest sequence; the vendor's context by default.
        """
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.max_model_len = (
            config.default_max_model_len if max_model_len is None else max_model_len
        )
        rope = ops.rope_table(self.max_model_len, config.head_dim, config.rope_theta, dtype)
        rope = rope.to(self.device)
        h, v = config.hidden_size, config.vocab_size
        self.embedding = parameter(v, h, dtype=dtype, device=device)
        self.norm = parameter(h, dtype=dtype, device=device)
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = parameter(v, h, dtype=dtype, device=device)
        layers = []
        for i, kind in enumerate(config.layer_types):
            earlier = config.layer_types[:i].count(kind)
            mixer = (
                ShortConv(config, earlier, dtype, device)
                if kind == "conv"
                else Attention(config, earlier, rope, dtype, device)
            )
            sparse = config.num_experts > 0 and i >= config.num_dense_layers
            ffn = SparseMoE(config, dtype, device) if sparse else DenseFFN(config, dtype, device)
            layers.append(Layer(mixer, ffn))
        self.layers = nn.ModuleList(layers)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run one step.

        Args:
            batch: The step's tokens and state; its pools are written in place.

        Returns:
            ``[L, vocab]`` in ``dtype``: the logits after the tokens ``batch.logits_index``.
        """
        x = F.embedding(batch.token_ids, self.embedding)
        for layer in self.layers:
            x = layer(x, batch)
        wanted = x.index_select(0, batch.logits_index)
        logits: torch.Tensor = ops.linear(
            wanted, self.head, norm_weight=self.norm, eps=self.config.norm_eps
        )
        return logits

    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of the parameters by class, in the order of ``weights.CLASSES``."""
        kinds = {place.target: place.kind for _, place in expected_tensors(self.config)}
        totals = dict.fromkeys(CLASSES, 0)
        for name, tensor in self.named_parameters():
            totals[kinds[name]] += tensor.numel() * tensor.element_size()
        return totals
