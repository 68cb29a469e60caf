"""The scheduler against a device of hashes: any wrong page, slot or token shows in the text."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from hash_device import HashDevice, expected_output
from lfm2_gpu.api import FinishReason, RequestMetrics, SamplingParams
from lfm2_gpu.engine.blocks import IdPool
from lfm2_gpu.engine.config import PAGE_SIZE, EngineConfig, pages_for
from lfm2_gpu.engine.request import Plan, Request, Status
from lfm2_gpu.engine.scheduler import Scheduler
from lfm2_gpu.errors import InvalidRequest

VOCAB = 97
STOP = 13


def make_config(**changes: int) -> EngineConfig:
    sizes = {
        "max_model_len": 400,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 96,
        "num_pages": 12,
        "vocab_size": VOCAB,
    }
    return EngineConfig(**(sizes | changes))


def make_request(rng: random.Random, config: EngineConfig, name: str, **changes: int) -> Request:
    longest = min(config.max_model_len - 2, changes.get("longest", 200))
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
    limit = rng.randint(len(prompt) + 1, min(len(prompt) + 120, config.max_model_len))
    stop = (STOP,) if rng.random() < 0.5 else tuple(range(20, 20 + rng.randint(0, 12)))
    return Request(
        request_id=name,
        index=rng.randrange(3),
        prompt=prompt,
        params=SamplingParams(),
        seed=rng.getrandbits(63),
        limit=limit,
        stop_ids=stop,
        metrics=RequestMetrics(arrival_time=0.0),
        watched=rng.random() < 0.3,
    )


class Simulation:
    """Scheduler and device with ``lag`` steps in flight: commits come that many steps late."""

    def __init__(self, config: EngineConfig, seed: int, lag: int) -> None:
        self.config = config
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(config)
        self.device = HashDevice(config)
        self.lag = lag
        self.flying: deque[tuple[Plan, np.ndarray]] = deque()
        self.ended: list[Request] = []
        self.steps = 0

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.check(plan)
            self.flying.append((plan, self.device.run(plan)))
        if self.flying and (plan is None or len(self.flying) > self.lag):
            done, tokens = self.flying.popleft()
            touched = self.scheduler.commit(done, tokens)
            self.ended += [r for r in touched if r.status is Status.FINISHED]
        self.steps += 1

    def check(self, plan: Plan) -> None:
        scheduler, config = self.scheduler, self.config
        assert 0 < len(plan.token_ids) == plan.query_lens.sum() <= config.max_num_batched_tokens
        assert len(set(plan.slots.tolist())) == len(plan.slots)
        assert (plan.slots > 0).all()
        held = [page for r in scheduler.running.values() for page in r.pages]
        assert len(held) == len(set(held)) == config.num_pages - scheduler.pages.num_free
        assert len(scheduler.running) == config.max_num_seqs - scheduler.slots.num_free
        ends = plan.starts + plan.query_lens
        assert plan.max_seq_len == ends.max() <= config.max_model_len
        table = scheduler.table
        assert (table.planned[plan.slots] <= table.limit[plan.slots]).all()
        # a page-table entry written twice in one step would race on the device
        entries = list(zip(plan.page_slots, plan.page_columns, strict=True))
        assert len(entries) == len(set(entries))
        for (slot, column), page in zip(entries, plan.page_ids, strict=True):
            assert scheduler.running[slot].pages[column] == page
        for slot, end in zip(plan.slots.tolist(), ends.tolist(), strict=True):
            assert end <= len(scheduler.running[slot].pages) * PAGE_SIZE

    def drain(self, most: int = 100_000) -> None:
        while self.scheduler.has_work or self.flying:
            self.step()
            assert self.steps < most, "the scheduler makes no progress"
        assert self.scheduler.pages.num_free == self.config.num_pages
        assert self.scheduler.slots.num_free == self.config.max_num_seqs


def check_output(request: Request) -> None:
    """The output is the oracle's up to its end, and the end is where and why it should be."""
    count = len(request.output)
    assert request.output == expected_output(request, VOCAB, count)
    stops = [i for i, token in enumerate(request.output) if token in request.stop_ids]
    if request.finish_reason is FinishReason.STOP:
        assert stops == [count - 1]
    else:
        assert not stops
    if request.finish_reason is FinishReason.LENGTH:
        assert request.num_tokens == request.limit


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 3},
        {"max_num_batched_tokens": 1, "max_num_seqs": 3},
        {"num_pages": 7, "max_num_seqs": 12},
        {"num_pages": 7, "max_model_len": 448, "max_num_seqs": 16, "max_num_batched_tokens": 16},
        {"max_num_seqs": 1, "num_pages": 40},
    ],
    ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()) or "plain",
)
def test_random_traffic_gives_each_request_its_own_text(sizes: dict[str, int], lag: int) -> None:
    config = make_config(**sizes)
    sim = Simulation(config, seed=7 + lag, lag=lag)
    rng, requests = sim.rng, []
    for i in range(60):
        request = make_request(rng, config, str(i))
        requests.append(request)
        sim.scheduler.add(request)
        for _ in range(rng.randrange(6)):
            sim.step()
        if rng.random() < 0.15:
            victim = rng.choice(requests)
            sim.scheduler.abort(victim, FinishReason.ABORT)
    sim.drain()
    for request in requests:
        assert request.status is Status.FINISHED
        check_output(request)
    natural = [r for r in requests if r.finish_reason is not FinishReason.ABORT]
    assert {id(r) for r in sim.ended} == {id(r) for r in natural}
    assert len(natural) > 40


def test_few_pages_force_preemption() -> None:
    config = make_config(num_pages=7, max_num_seqs=12)
    sim = Simulation(config, seed=1, lag=1)
    requests = [make_request(sim.rng, config, str(i), longest=60) for i in range(20)]
    for request in requests:
        sim.scheduler.add(request)
    while not sim.scheduler.num_preemptions:
        sim.step()
    while all(r.status is not Status.WAITING or not r.output for r in requests):
        sim.step()
    # who gave its pages back is the first to get some again
    assert sim.scheduler.waiting[0].output
    sim.drain()
    for request in requests:
        check_output(request)


def test_a_victim_of_the_same_step_leaves_no_page_write() -> None:
    config = make_config(max_model_len=192, num_pages=3, max_num_seqs=2)
    sim = Simulation(config, seed=5, lag=0)
    first, old, young = (make_request(sim.rng, config, str(i), longest=1) for i in range(3))
    for request, length, limit in ((first, 1, 2), (old, 62, 150), (young, 63, 150)):
        request.prompt, request.limit, request.stop_ids = [3] * length, limit, ()
    sim.scheduler.add(first)
    sim.scheduler.add(old)
    sim.step()
    sim.scheduler.add(young)
    sim.step()
    # the younger one sits in the lower slot, so it is given the last page before it is chosen
    assert (young.slot, old.slot) == (1, 2)
    sim.step()
    sim.step()
    assert sim.scheduler.num_preemptions == 1
    sim.drain()
    for request in (first, old, young):
        check_output(request)


def test_a_short_budget_serves_all_decoding_rows_in_turn() -> None:
    config = make_config(max_num_batched_tokens=2, max_num_seqs=5, num_pages=40)
    sim = Simulation(config, seed=2, lag=0)
    requests = []
    for i in range(5):
        request = make_request(sim.rng, config, str(i), longest=1)
        request.limit, request.stop_ids = 300, ()
        requests.append(request)
        sim.scheduler.add(request)
    table = sim.scheduler.table
    # decoding may not starve the prefills behind it
    while sim.steps < 20:
        sim.step()
    before = [int(table.known[r.slot]) for r in requests]
    assert all(table.decoding[r.slot] for r in requests)
    for _ in range(25):
        sim.step()
    gained = [int(table.known[r.slot]) - b for r, b in zip(requests, before, strict=True)]
    assert sum(gained) == 50
    assert max(gained) - min(gained) <= 1


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    config = make_config(num_pages=7)
    sim = Simulation(config, seed=3, lag=0)
    big = [make_request(sim.rng, config, f"big{i}") for i in range(2)]
    for request in big:
        request.prompt = [1] * 250
        request.limit, request.stop_ids = 300, ()
        sim.scheduler.add(request)
    small = make_request(sim.rng, config, "small", longest=3)
    sim.scheduler.add(small)
    sim.step()
    assert [r.request_id for r in sim.scheduler.waiting] == ["big1", "small"]


def test_a_negative_token_ends_only_its_request() -> None:
    config = make_config()
    scheduler = Scheduler(config)
    rng = random.Random(4)
    requests = [make_request(rng, config, str(i), longest=5) for i in range(3)]
    for request in requests:
        request.limit = len(request.prompt) + 10
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    touched = scheduler.commit(plan, np.array([95, -1, 96], np.int32))
    bad = requests[1]
    assert bad in touched
    assert (bad.status, bad.finish_reason) == (Status.FINISHED, FinishReason.ERROR)
    assert bad.error is not None
    assert len(scheduler.running) == 2
    for request in requests:
        scheduler.abort(request, FinishReason.ABORT)
    assert not scheduler.has_work


def test_an_id_freed_twice_raises() -> None:
    pool = IdPool(4, "page")
    held = pool.allocate(3)
    assert held == [1, 2, 3]
    pool.free([2])
    for wrong in (2, 0, 5, -1):
        with pytest.raises(ValueError, match=f"page {wrong} is freed but not held"):
            pool.free([wrong])


def test_config_refuses_what_cannot_work() -> None:
    with pytest.raises(InvalidRequest, match="max_num_seqs is 0, want a positive integer"):
        make_config(max_num_seqs=0)
    with pytest.raises(InvalidRequest, match="num_pages is 6, want at least 7"):
        make_config(num_pages=6)
    assert pages_for(0) == 0
    assert pages_for(64) == 1
    assert pages_for(65) == 2
