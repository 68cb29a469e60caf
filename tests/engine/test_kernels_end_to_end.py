"""The same engine and model through the Triton kernels, against the reference ops.

Every mixer and both kinds of FFN run, prefill chunks mix with decode rows, and rows are preempted.
Slow in the interpreter, so the traffic is small; on a GPU the bodies are the same.
"""

from __future__ import annotations

import pytest
import torch

import tiny_engine as tiny
from tiny_engine import params, prompts

WANTED = params(max_tokens=3, temperature=0.7, top_k=20, repetition_penalty=1.1)


def generate() -> tuple[list[list[int]], int]:
    engine = tiny.tiny_engine(max_num_batched_tokens=24, num_pages=7, max_num_seqs=3)
    many = prompts(3, seed=2, longest=24)
    requests = [engine.add(str(i), p, WANTED, seed=i)[0] for i, p in enumerate(many)]
    tiny.finish(engine)
    return [r.output for r in requests], engine.num_steps


def test_kernels_and_reference_generate_the_same_tokens(request: pytest.FixtureRequest) -> None:
    want, steps = generate()
    assert steps > 3
    assert len({tuple(o) for o in want}) == 3
    request.getfixturevalue("interpreted")
    got, _ = generate()
    assert got == want


def test_kernels_and_reference_give_the_same_logits(request: pytest.FixtureRequest) -> None:
    stepper = pytest.importorskip("stepper")
    model = tiny.tiny_model()
    first, second = prompts(2, seed=4, longest=20)

    def logits() -> list[torch.Tensor]:
        steps = stepper.Stepper(model, 2, 128)
        parts = steps.step([(0, first), (1, second[:2])], padding=1)
        # a chunk beside a decode row, then two decode rows, with padding
        parts += steps.step([(0, [5]), (1, second[2:] or [6])], padding=2)
        return parts + steps.step([(0, [8]), (1, [9])], padding=1)

    want = logits()
    request.getfixturevalue("interpreted")
    for got, expected in zip(logits(), want, strict=True):
        # fp32 sums in another order, six layers deep
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
