"""Triton kernels of LFM2, one function per op.

CUDA tensors run on the kernels, CPU tensors through ``reference.py``, which says what each op does.
"""

from .attention_decode import attention_decode, attention_decode_workspace
from .attention_prefill import attention_prefill
from .linear import linear
from .moe import grouped_linear, grouped_swiglu, moe, moe_combine
from .moe_sort import sort_tokens
from .penalties import process_logits, update_seen
from .qk_norm_rope import qk_norm_rope
from .reference import PAGE_SIZE, rope_table
from .rmsnorm import add_rmsnorm, rmsnorm
from .router import route
from .sampling import sample, token_logprobs
from .short_conv import short_conv_decode, short_conv_prefill
from .swiglu import swiglu

__all__ = [
    "PAGE_SIZE",
    "add_rmsnorm",
    "attention_decode",
    "attention_decode_workspace",
    "attention_prefill",
    "grouped_linear",
    "grouped_swiglu",
    "linear",
    "moe",
    "moe_combine",
    "process_logits",
    "qk_norm_rope",
    "rmsnorm",
    "rope_table",
    "route",
    "sample",
    "short_conv_decode",
    "short_conv_prefill",
    "sort_tokens",
    "swiglu",
    "token_logprobs",
    "update_seen",
]
