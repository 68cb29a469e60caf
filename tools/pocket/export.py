"""Write the checkpoint of the last saved state: ``python -m tools.pocket.export``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from .model import build, export
from .template import ASSETS


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    model = build(seed=0)
    model.load_state_dict(torch.load(args.work / "state.pt", weights_only=True)["model"])
    export(model, args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.work / name, args.out / name)


if __name__ == "__main__":
    main()
