"""What only a GPU can show: the real shapes, pools past 2^31 elements, and repeatable bits.

Kernel tests run on the GPU too where there is one (``tests/kernels``); these need one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lfm2_kernels as ops
from lfm2_gpu.engine.config import EngineConfig, pages_for
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.runner import Runner
from lfm2_gpu.loader import load_model, random_model
from lfm2_gpu.model.lfm2 import Lfm2Model
from lfm2_gpu.model_table import PUBLIC_CONFIGS
from lfm2_kernels import reference
from tiny_engine import CONFIG, finish, params, prompts

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model_24b() -> Iterator[Lfm2Model]:
    config = PUBLIC_CONFIGS["LFM2-24B-A2B"]
    needed = 2 * config.num_parameters + 6 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    yield random_model(config, device="cuda", dtype=torch.bfloat16, max_model_len=33_000)
    torch.cuda.empty_cache()


def engine_of(model: Lfm2Model, max_model_len: int, max_num_seqs: int) -> Engine:
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=4096,
        num_pages=max_num_seqs * pages_for(max_model_len),
        vocab_size=model.config.vocab_size,
    )
    return Engine(Runner(model, config))


def generate(engine: Engine, many: list[list[int]], count: int) -> list[list[int]]:
    requests = [
        engine.add(str(i), prompt, params(max_tokens=count), seed=i)[0]
        for i, prompt in enumerate(many)
    ]
    finish(engine)
    assert all(r.error is None for r in requests)
    return [r.output for r in requests]


def test_24b_prefills_and_decodes_the_same_bits_twice(model_24b: Lfm2Model) -> None:
    rng = random.Random(0)
    many = [[rng.randrange(60_000) for _ in range(n)] for n in (1, 63, 64, 65, 700, 1500)]
    first = generate(engine_of(model_24b, 2048, 8), many, 12)
    assert generate(engine_of(model_24b, 2048, 8), many, 12) == first
    assert len({tuple(output) for output in first}) == len(many)


def test_24b_prefills_its_whole_context_and_decodes(model_24b: Lfm2Model) -> None:
    rng = random.Random(1)
    prompt = [rng.randrange(60_000) for _ in range(32_768)]
    engine = engine_of(model_24b, 32_768 + 64, 1)
    (output,) = generate(engine, [prompt], 8)
    assert len(output) == 8


def test_attention_reads_and_writes_the_last_pages_of_a_large_pool() -> None:
    kv_heads, heads, dim, length = 8, 32, 64, 200
    page_elements = 2 * kv_heads * 64 * dim
    pages = 2**31 // page_elements + 16
    pool = torch.empty(pages, 2, kv_heads, 64, dim, dtype=torch.bfloat16, device="cuda")
    small = torch.zeros(16, 2, kv_heads, 64, dim, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    near = ints(0, 0, 0, 0, 1, 2, 3, 4).view(2, 4)
    # the same pages at the far end, where an int32 offset would have wrapped
    far = torch.where(near > 0, near + pages - 8, 0).int()
    positions = torch.arange(length, dtype=torch.int32, device="cuda")
    common = {
        "eps": 1e-5,
        "positions": positions,
        "token_rows": torch.zeros_like(positions),
        "slots": ints(1),
        "kv_write_from": ints(0, 0),
    }
    qkv = normal(length, (heads + 2 * kv_heads) * dim)
    weights = normal(dim), normal(dim)
    rope = ops.rope_table(length, dim, 1e6, torch.bfloat16).cuda()
    q = ops.qk_norm_rope(qkv, *weights, rope, pool, page_table=far, **common)
    want_q = reference.qk_norm_rope(qkv, *weights, rope, small, page_table=near, **common)
    torch.testing.assert_close(q, want_q, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(pool[-7:-3], small[1:5], rtol=2**-7, atol=2**-7)

    scale = dim**-0.5
    bounds = ints(0, length)
    attended = ops.attention_prefill(
        q, pool, far, positions=positions, query_start_loc=bounds, slots=ints(1), scale=scale
    )
    want = reference.attention_prefill(
        q, small, near, positions=positions, query_start_loc=bounds, slots=ints(1), scale=scale
    )
    # p is rounded to bf16 before p v, the sum is of order one
    torch.testing.assert_close(attended, want, rtol=2**-6, atol=2**-6)
    last = ops.attention_decode(
        q[-1:],
        pool,
        far,
        positions=positions[-1:],
        slots=ints(1),
        scale=scale,
        max_seq_len=length,
    )
    torch.testing.assert_close(last, want[-1:], rtol=2**-6, atol=2**-6)


def test_tiny_model_agrees_with_the_cpu_in_every_dtype() -> None:
    many = prompts(12, seed=1)
    # far apart for fp32 rounding; in bf16 a near tie may fall either way
    for dtype, agree in ((torch.float32, 1.0), (torch.bfloat16, 0.5)):
        cpu = random_model(CONFIG, device="cpu", dtype=dtype, seed=1)
        gpu = Lfm2Model(CONFIG, dtype, "cuda")
        gpu.load_state_dict(cpu.state_dict())
        want = generate(engine_of(cpu, 256, 12), many, 8)
        got = generate(engine_of(gpu, 256, 12), many, 8)
        same = sum(g == w for g, w in zip(got, want, strict=True))
        assert same >= agree * len(many)


def test_greedy_tokens_are_transformers_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import checkpoints

    for index, shape in enumerate(({"moe": False}, {"moe": True})):
        folder = checkpoints.build(tmp_path / str(index), seed=index, **shape)
        model = load_model(folder, device="cuda", dtype=torch.float32, max_model_len=256)
        many = [[t % model.config.vocab_size for t in p] for p in prompts(8, seed=index)]
        oracle = checkpoints.oracle(folder)
        for prompt, output in zip(many, generate(engine_of(model, 256, 8), many, 32), strict=True):
            # whole unpadded prompts, which every release of transformers reads right
            with torch.no_grad():
                logits = oracle(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
            assert output == logits.argmax(dim=-1).tolist()
