"""The long tests at full size: ``make soak`` runs them, the test suite a small share of each.

Scheduler: each seed draws the sizes of an engine, how many steps are in flight, and a stream of
requests and aborts, and checks every plan and every text against an oracle
(``engine/test_scheduler.py``). Streaming: all 47.7 GB of a sparse checkpoint of the 24B shape pass
through the loader into nothing, and the process's memory is watched (``test_loader.py``).

    PYTHONPATH=.:kernels python tests/soak.py [--seeds 5000] [--first 0] [--out docs/soak]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine")]

from test_scheduler import Simulation, check_output, make_config, make_request  # noqa: E402

from lfm2_gpu.api import FinishReason  # noqa: E402
from lfm2_gpu.bench.schema import machine  # noqa: E402
from lfm2_gpu.engine.config import pages_for  # noqa: E402
from test_loader import stream_24b  # noqa: E402


def soak_scheduler(seed: int) -> Counter[str]:
    """One seed's traffic; what it amounted to. Fails by AssertionError."""
    rng = random.Random(seed)
    longest = rng.choice((70, 200, 400, 700))
    config = make_config(
        max_model_len=longest,
        max_num_seqs=rng.choice((1, 2, 6, 20)),
        max_num_batched_tokens=rng.choice((1, 2, 7, 64, 96, 1000)),
        # from as few pages as hold one request: then preemption is the rule
        num_pages=pages_for(longest) + rng.choice((0, 1, 3, 30)),
    )
    sim = Simulation(config, seed=rng.getrandbits(32), lag=rng.randrange(3))
    requests = []
    for i in range(rng.randint(1, 60)):
        requests.append(make_request(rng, config, str(i)))
        sim.scheduler.add(requests[-1])
        for _ in range(rng.randrange(8)):
            sim.step()
        if rng.random() < 0.1:
            sim.scheduler.abort(rng.choice(requests), FinishReason.ABORT)
    sim.drain()
    for request in requests:
        check_output(request)
    return Counter(
        requests=len(requests),
        steps=sim.steps,
        tokens=sum(len(request.output) for request in requests),
        preemptions=sum(request.metrics.num_preemptions for request in requests),
        aborted=sum(request.finish_reason is FinishReason.ABORT for request in requests),
    )


def run_scheduler(first: int, seeds: int) -> dict[str, Any]:
    """All seeds; those that failed are listed and shown."""
    totals: Counter[str] = Counter()
    failures = []
    for seed in range(first, first + seeds):
        try:
            totals += soak_scheduler(seed)
        except AssertionError as error:
            failures.append(seed)
            sys.stderr.write(f"seed {seed}: {error}\n")
    return {"first_seed": first, "seeds": seeds, "failures": failures, **totals}


def run_streaming() -> dict[str, Any]:
    """The whole 24B, every page touched; the promise is 1 GB above the mapped file."""
    with tempfile.TemporaryDirectory() as folder:
        streamed, peak = stream_24b(Path(folder), 1.0)
    failures = [] if peak < 10**9 else [f"the process grew by {peak} bytes"]
    return {"streamed_bytes": streamed, "peak_growth_bytes": peak, "failures": failures}


def main() -> int:
    """Run everything, print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for one JSON file each")
    options = parser.parse_args()
    failed = False
    for name, run in (
        ("scheduler", lambda: run_scheduler(options.first, options.seeds)),
        ("streaming", run_streaming),
    ):
        started = time.monotonic()
        result = run()
        result["seconds"] = round(time.monotonic() - started, 1)
        result["machine"] = machine(TESTS.parent)
        failed |= bool(result["failures"])
        text = json.dumps(result, indent=1) + "\n"
        sys.stdout.write(text)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.json").write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
