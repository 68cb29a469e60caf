"""Benchmark cases: every op has one, right ops agree with their reference, wrong ones do not."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

import lfm2_kernels
from lfm2_gpu.bench.cases import BUILDERS, Sizes, build
from lfm2_gpu.config import ModelConfig
from lfm2_kernels import reference

CONFIG = ModelConfig(
    architecture="lfm2_moe",
    vocab_size=300,
    hidden_size=96,
    num_hidden_layers=2,
    layer_types=("conv", "full_attention"),
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=80,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    num_dense_layers=1,
)


def sizes(tokens: int, dtype: torch.dtype = torch.float32) -> Sizes:
    return Sizes(CONFIG, tokens, dtype, torch.device("cpu"), context=70)


def test_every_op_has_a_case() -> None:
    ops = {
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    # the table of angles is made once, the draw's parts are no ops of their own
    assert set(BUILDERS) == ops - {"rope_table", "exponential_race"}


@pytest.mark.parametrize("op", BUILDERS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_cases_agree_with_the_reference(op: str, tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = build(op, sizes(tokens, dtype))
        assert case.deviation() <= case.tolerance < 0.02
        assert case.bytes > 0
        assert case.flops >= 0


@pytest.mark.parametrize("op", BUILDERS)
def test_a_wrong_op_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(lfm2_kernels, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        # update_seen writes its second argument and returns nothing
        parts = args[1:] if result is None else result if isinstance(result, tuple) else (result,)
        # one value of the first result, by a little; ids by one
        parts[0].view(-1)[0] += 0.1 if parts[0].is_floating_point() else 1
        return result

    case = build(op, sizes(70))
    monkeypatch.setattr(lfm2_kernels, op, wrong)
    # one draw of seventy is over the share that rounding may move
    assert case.deviation() > case.tolerance


def test_nan_and_unwritten_state_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("rmsnorm", sizes(5))
    monkeypatch.setattr(lfm2_kernels, "rmsnorm", lambda *args: reference.rmsnorm(*args) * math.nan)
    assert math.isnan(case.deviation())
    case = build("add_rmsnorm", sizes(5))
    forgets = lambda x, residual, weight, eps: reference.rmsnorm(x + residual, weight, eps)  # noqa: E731
    monkeypatch.setattr(lfm2_kernels, "add_rmsnorm", forgets)
    assert case.deviation() > case.tolerance


def test_work_of_known_cases() -> None:
    # x and y of 70 x 96 and the weight, 4 bytes each
    assert build("rmsnorm", sizes(70)).bytes == 4 * (2 * 70 * 96 + 96)
    linear = build("linear", sizes(70))
    assert linear.bytes == 4 * (70 * 96 + 288 * 96 + 70 * 288)
    assert linear.flops == 2 * 70 * 96 * 288
    # 3 heads of 32 over the lower triangle, for scores and for values
    assert build("attention_prefill", sizes(70)).flops == 2 * 2 * 3 * 32 * (70 * 71 // 2)
    # queries and results of 5 rows, keys and values of 70 positions each
    assert build("attention_decode", sizes(5)).bytes == 4 * (2 * 5 * 96 + 5 * 70 * 2 * 32)
    # one token reaches two of four experts
    one = build("moe", sizes(1))
    assert one.bytes == 4 * (3 * 96 + 2 * (3 * 48 * 96))
    assert one.flops == 2 * 2 * (3 * 48 * 96)
