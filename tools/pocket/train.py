"""Train the pocket model: ``python -m tools.pocket.train --minutes 100``.

The trainer is transformers' ``Lfm2MoeForCausalLM``, so the checkpoint is made by code that is not
ours. One step takes a micro-batch of each kind of row: prose with the loss on every token,
dialogues with the loss on what the assistant says. Rows are grouped by length and padded on the
right, so no document sees another. The learning rate warms up, stays, and falls linearly to zero
over the last part of the wall time. The state is saved every five minutes and picked up by the next
run.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import Lfm2MoeForCausalLM

from .model import COUNT_MULTIPLE, RouterBalance, build
from .muon import Muon
from .prepare import KINDS

# tokens of each kind in a step, and the weight of the kind's mean loss
MICRO_TOKENS = {"prose": 1536, "tools": 3072, "chat": 1024}
LOSS_WEIGHTS = {"prose": 0.35, "tools": 0.45, "chat": 0.2}
# rows are padded to this multiple: few shapes, see model._padded_experts
WIDTH_MULTIPLE = 32
PEAK_RATE = 3e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.1
SAVE_SECONDS = 300
LOG_STEPS = 20


class Batches:
    """Endless shuffled batches of one kind of row, each of rows of like length."""

    def __init__(self, data: dict[str, np.ndarray], kind: str, seed: int) -> None:
        """Select the rows.

        Args:
            data: the arrays of ``tokens.npz``.
            kind: one of ``prepare.KINDS``.
            seed: of the order.
        """
        self._data = data
        self._rows = np.flatnonzero(data["kinds"] == KINDS.index(kind))
        self._lengths = np.diff(data["offsets"])[self._rows]
        self._tokens = MICRO_TOKENS[kind]
        self._rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield token ids ``[rows, width + 1]`` and their loss mask of the same shape."""
        widths = -(-(self._lengths - 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        while True:
            groups = []
            for width in np.unique(widths):
                rows = self._rng.permutation(self._rows[widths == width])
                size = max(1, self._tokens // int(width))
                groups += [
                    (int(width), size, rows[i : i + size]) for i in range(0, len(rows), size)
                ]
            for i in self._rng.permutation(len(groups)):
                yield self._pad(*groups[i])

    def _pad(self, width: int, size: int, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.zeros((size, width + 1), np.int64)
        mask = np.zeros((size, width + 1), bool)
        for i, row in enumerate(rows):
            first, last = self._data["offsets"][row], self._data["offsets"][row + 1]
            ids[i, : last - first] = self._data["ids"][first:last]
            mask[i, : last - first] = self._data["mask"][first:last]
        return torch.from_numpy(ids), torch.from_numpy(mask)


def micro_loss(model: Lfm2MoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the marked tokens; the head runs on their rows alone."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = torch.nonzero(mask[:, 1:].flatten()).flatten()
    extra = -len(wanted) % COUNT_MULTIPLE
    targets = functional.pad(ids[:, 1:].flatten()[wanted], (0, extra), value=-100)
    rows = functional.pad(wanted, (0, extra))
    logits = model.lm_head(hidden.flatten(0, 1)[rows])
    return functional.cross_entropy(logits.float(), targets)


def make_optimizers(model: Lfm2MoeForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest (embedding, router, norms)."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("conv.conv.weight"):
            vectors.append(parameter)
        elif "embed_tokens" in name or name.endswith("gate.weight"):
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups,
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    return [Muon(matrices, PEAK_RATE, weight_decay=WEIGHT_DECAY), adamw]


class Trainer:
    """Model, optimiser and counters of one run, saved and restored as one file."""

    def __init__(self, work: Path, seed: int, bf16: bool, weights: Path | None = None) -> None:
        """Build everything and restore the work folder's state if there is one.

        Args:
            work: holds ``tokens.npz`` and the state.
            seed: of weights and batch order.
            bf16: run the forward pass under bfloat16 autocast.
            weights: checkpoint to start from where there is no state; None for random weights.
        """
        self._path = work / "state.pt"
        self._bf16 = bf16
        self.model = build(seed, weights)
        self.step = 0
        self.tokens = 0
        self.curve: list[dict[str, float]] = []
        self.optimizers = make_optimizers(self.model)
        if self._path.exists():
            self._restore()
        self.balance = RouterBalance(self.model)
        with np.load(work / "tokens.npz") as loaded:
            data = {name: loaded[name] for name in loaded.files}
        # a resumed run continues with another order, never with the same batches again
        start = seed + self.step
        self._batches = {k: iter(Batches(data, k, start + i)) for i, k in enumerate(KINDS)}

    def _restore(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.curve = state["step"], state["tokens"], state["curve"]

    def save(self) -> None:
        """Write the state beside the old one, then replace it."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "curve": self.curve,
        }
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path)

    def train_step(self, rate: float) -> dict[str, float]:
        """Take one step at a learning rate and return the losses by kind."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        losses = {}
        for kind in KINDS:
            ids, mask = next(self._batches[kind])
            self.balance.counted = (ids[:, :-1] != 0).flatten()
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                loss = micro_loss(self.model, ids, mask)
            (LOSS_WEIGHTS[kind] * loss).backward()
            losses[kind] = loss.item()
            self.tokens += int(self.balance.counted.sum())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses["least_expert"] = self.balance.step().min().item()
        self.step += 1
        return losses


def rate_at(step: int, seconds_left: float, decay_seconds: float) -> float:
    """Return the learning rate: warm-up by steps, then constant, then linear to zero by time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * warm * min(1.0, max(0.0, seconds_left) / decay_seconds)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    parser.add_argument("--minutes", type=float, required=True, help="wall time of this run")
    parser.add_argument("--decay-minutes", type=float, default=25.0, help="0: no decay yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="checkpoint to start from without a state")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.work, args.seed, not args.fp32, args.weights)
    stop = {"asked": False}
    signal.signal(signal.SIGTERM, lambda *_: stop.update(asked=True))

    start = saved = time.monotonic()
    end = start + 60 * args.minutes
    decay = 60 * args.decay_minutes if args.decay_minutes else 1e-9
    log: dict[str, float] = {}
    with tqdm(desc="train", unit="step", initial=trainer.step, mininterval=5) as bar:
        while time.monotonic() < end and not stop["asked"]:
            rate = rate_at(trainer.step, end - time.monotonic(), decay)
            losses = trainer.train_step(rate)
            log = {k: log.get(k, 0.0) + v / LOG_STEPS for k, v in losses.items()}
            bar.update()
            if trainer.step % LOG_STEPS == 0:
                trainer.curve.append(
                    {"step": trainer.step, "tokens": trainer.tokens, "rate": rate, **log}
                )
                shown = {k: f"{v:.3f}" for k, v in log.items()}
                bar.set_postfix(tok=f"{trainer.tokens / 1e6:.2f}M", **shown)
                log = {}
            if time.monotonic() - saved > SAVE_SECONDS:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    (args.work / "curve.json").write_text(json.dumps(trainer.curve) + "\n", "utf-8")


if __name__ == "__main__":
    main()
