"""Muon: momentum whose matrix updates are made orthogonal, for the model's inner matrices.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The update is scaled by
0.2 * sqrt(max(rows, columns)), so that AdamW's learning rate and weight decay carry over
(Liu et al. 2025, https://arxiv.org/abs/2502.16982). ``torch.optim.Muon`` takes matrices only, and
experts are stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Return the matrices with all singular values moved near one.

    Args:
        update: ``[..., M, N]``.
    """
    a, b, c = _NEWTON_SCHULZ
    x: torch.Tensor = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters of shape ``[..., M, N]``.

        Args:
            params: the matrices, leading dimensions are batches.
            lr: as for AdamW.
            momentum: of the gradient average.
            weight_decay: as for AdamW.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; a closure is not supported.

        Args:
            closure: must be None.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("muon: got a closure, want None")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                scale = 0.2 * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)
