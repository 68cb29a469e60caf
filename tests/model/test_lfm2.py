"""The graph itself: through the Triton kernels, on poisoned state, and sensitive to its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_kernels as ops
from checkpoints import build
from lfm2_gpu.loader import load_model
from stepper import Stepper, blind_spots, greedy

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("moe"), 0, moe=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dense"), 0)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_compute_what_the_reference_does(
    tmp_path: Path, moe: bool, dtype: torch.dtype, request: pytest.FixtureRequest, device: Any
) -> None:
    """Each mixer kind, the dense FFN and the experts, in prefill, mixed and decode steps."""
    folder = build(tmp_path / "x", 1, moe=moe, conv_bias=True, dtype=dtype, **SMALL)
    texts = [[5, 9, 2, 77, 31, 8, 3], [4, 4, 60]]

    def run(where: Any) -> torch.Tensor:
        stepper = Stepper(load_model(folder, device=where), 2, 80)
        parts = stepper.step([(0, texts[0]), (1, texts[1][:2])], padding=1)
        parts += stepper.step([(1, texts[1][2:]), (0, [1, 2])], padding=2)
        parts += stepper.step([(0, [7]), (1, [8])], padding=1)
        return torch.cat(parts).float().cpu()

    want = run("cpu")
    request.getfixturevalue("interpreted")
    got = run(device)
    # fp32: the order of sums. bf16: a sum next to a rounding boundary moves a value by one part in
    # 128; logits of unit scale then move by a few such parts, as docs/numerics.md derives
    bound = 2e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_test_models_see_faults_in_their_state(kind: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(kind), device="cpu")
    # of twenty faults, nearly all must change a greedy token
    missed = [fault for seed in range(2) for fault in blind_spots(model, seed=seed)]
    assert len(missed) <= 1, missed
    # and texts do not fall into a loop, where a fault could heal
    for text in greedy(model, [[1, 2, 3], [9] * 30], 64):
        assert len(set(text)) >= 30


def test_first_computed_and_kv_write_from_are_honoured(moe: Path) -> None:
    model = load_model(moe, device="cpu")
    ids = list(range(20, 60))
    stepper = Stepper(model, 1, 64)
    whole = stepper.step([(0, ids)])[0]
    slot, pages = stepper.slots[0], [pool.clone() for pool in stepper.pools.kv_pages]
    # two conv layers of three taps forget what is four tokens back: replay these over cached keys
    stepper.lengths[0] = stepper.first_computed[slot] = 30
    stepper.kv_write_from[slot] = 34
    for ring in stepper.pools.conv_state:
        ring[slot] = float("nan")
    replay = stepper.step([(0, ids[30:])])[0]
    torch.testing.assert_close(replay[4:], whole[34:], rtol=0, atol=2e-5)
    # the first tokens saw zeros, neither the ring nor positions 28 and 29
    assert bool(replay.isfinite().all())
    assert not torch.allclose(replay[0], whole[30], atol=1e-3)
    held = int(stepper.page_table[slot, 0])
    for page, before in zip(stepper.pools.kv_pages, pages, strict=True):
        assert torch.equal(page[held, :, :, :34], before[held, :, :, :34])


def test_padding_reaches_no_expert(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    compute = ops.moe

    def spy(x: torch.Tensor, w13: Any, w2: Any, weights: Any, ids: Any, **rest: Any) -> Any:
        seen.append(ids)
        return compute(x, w13, w2, weights, ids, **rest)

    monkeypatch.setattr(ops, "moe", spy)
    model = load_model(moe, device="cpu")
    Stepper(model, 1, 64).step([(0, [1, 2, 3])], padding=2)
    assert len(seen) == 3
    for ids in seen:
        assert int(ids[:3].max()) < 8
        assert ids[3:].tolist() == [[8, 8], [8, 8]]


def test_a_step_of_padding_alone_changes_nothing(moe: Path) -> None:
    model = load_model(moe, device="cpu")
    stepper = Stepper(model, 1, 64)
    stepper.step([(0, [1, 2, 3])])
    before = [pool[1:].clone() for pool in (*stepper.pools.kv_pages, *stepper.pools.conv_state)]
    assert stepper.step([], padding=3) == []
    after = [pool[1:] for pool in (*stepper.pools.kv_pages, *stepper.pools.conv_state)]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
