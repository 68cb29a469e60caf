"""From files to a model: every layout gives the same weights, in little host memory."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import build, edit_config
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import InvalidRequest, ModelFileError
from lfm2_gpu.formats import open_checkpoint
from lfm2_gpu.loader import load_model, random_model, read_config, stream_tensors
from lfm2_gpu.model.lfm2 import Lfm2Model
from lfm2_gpu.model.weights import Placement, expected_tensors, place_tensors
from lfm2_gpu.model_table import PUBLIC_CONFIGS
from stepper import greedy


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("moe"), 0, moe=True)


def same_weights(a: Lfm2Model, b: Lfm2Model) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def copy(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors")
    return target


def test_every_layout_gives_the_same_weights(moe: Path, tmp_path: Path) -> None:
    plain = load_model(moe, device="cpu")
    names = load_file(moe / "model.safetensors")
    assert any(name.endswith("experts.0.w1.weight") for name in names)
    fused = build(tmp_path / "f", 0, moe=True, save_options={"save_original_format": False})
    fused_names = load_file(fused / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in fused_names)
    sharded = build(tmp_path / "s", 0, moe=True, save_options={"max_shard_size": "300KB"})
    assert len(list(sharded.glob("*.safetensors"))) > 2
    bare = {name.removeprefix("model."): tensor for name, tensor in names.items()}
    for other in (fused, sharded, copy(moe, tmp_path / "bare", bare)):
        same_weights(load_model(other, device="cpu"), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(moe: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = build(tmp_path / "x", 0, moe=True, dtype=dtype)
    model = load_model(stored, device="cpu")
    assert model.dtype == dtype
    same_weights(model, load_model(stored, device="cpu", dtype=dtype))
    if dtype != torch.float32:
        converted = load_model(moe, device="cpu", dtype=dtype)
        same_weights(converted, model)


def test_max_model_len(moe: Path) -> None:
    assert load_model(moe, device="cpu").max_model_len == 4096
    model = load_model(moe, device="cpu", max_model_len=100)
    assert model.max_model_len == 100
    assert model.layers[1].mixer.rope.shape == (100, model.config.head_dim)


def test_chunks_do_not_show(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(moe, device="cpu")
    monkeypatch.setattr("lfm2_gpu.loader._CHUNK_BYTES", 1000)
    same_weights(load_model(moe, device="cpu"), whole)


def test_progress_counts_every_byte(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(moe, device="cpu", progress=True)
    assert "100%" in capsys.readouterr().err
    load_model(moe, device="cpu")
    assert capsys.readouterr().err == ""


def test_a_head_stored_beside_tied_embeddings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path / "tied", 0)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    equal = copy(folder, tmp_path / "equal", {**tensors, "lm_head.weight": embedding.clone()})
    model = load_model(equal, device="cpu")
    assert model.head is model.embedding
    assert caplog.text == ""
    # transformers uses such a head too, and warns
    other = copy(folder, tmp_path / "other", {**tensors, "lm_head.weight": -embedding})
    model = load_model(other, device="cpu")
    assert torch.equal(model.head, -embedding)
    assert "lm_head.weight is used, though the config ties it" in caplog.text


def test_ff_size_comes_from_the_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build(tmp_path / "x", 0)
    right = load_model(folder, device="cpu")
    # as some repacked checkpoints do: the real size, still to be adjusted
    edit_config(folder, block_auto_adjust_ff_dim=True, intermediate_size=128)
    same_weights(load_model(folder, device="cpu"), right)
    assert "the config's FFN size is 256, the tensors' 128" in caplog.text


def test_errors_name_file_and_tensor(moe: Path, tmp_path: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    broken = copy(moe, tmp_path / "broken", tensors)
    with pytest.raises(ModelFileError, match=r"broken: .*layers.1.self_attn.k_proj.weight is miss"):
        load_model(broken, device="cpu")
    with pytest.raises(InvalidRequest, match="revision"):
        load_model(moe, device="cpu", revision="main")
    with pytest.raises(ModelFileError, match="no such path"):
        load_model(str(tmp_path / "absent"), device="cpu")
    edit_config(broken, hidden_size=0)
    with pytest.raises(ModelFileError, match=r"config.json: hidden_size is 0"):
        load_model(broken, device="cpu")


def test_random_models_depend_on_the_seed_alone() -> None:
    config = ModelConfig(
        architecture="lfm2_moe",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        layer_types=("conv", "full_attention", "conv"),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_dense_layers=1,
    )
    models = [
        random_model(config, device="cpu", dtype=torch.float32, seed=seed, max_model_len=64)
        for seed in (3, 3, 4)
    ]
    same_weights(models[0], models[1])
    assert not torch.equal(models[0].embedding, models[2].embedding)
    assert float(models[0].embedding.std()) <= 0.31
    texts = [greedy(model, [[1, 2, 3]], 8) for model in models]
    assert texts[0] == texts[1] != texts[2]


def sparse_24b(folder: Path) -> ModelConfig:
    """The 47.7 GB of LFM2-24B-A2B as a file of holes, in the layout that its vendor ships."""
    config = PUBLIC_CONFIGS["LFM2-24B-A2B"]
    header, end = {}, 0
    for name, place in expected_tensors(config):
        dtype, size = ("F32", 4) if name.endswith("expert_bias") else ("BF16", 2)
        begin, end = end, end + size * torch.Size(place.shape).numel()
        entry = {"dtype": dtype, "shape": list(place.shape), "data_offsets": [begin, end]}
        header[f"model.{name}"] = entry
    raw = json.dumps(header).encode()
    # as the library does: tensors begin at a multiple of 8
    raw += b" " * (-len(raw) % 8)
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(file, 8 + len(raw) + end)
    if file.stat().st_blocks * 512 > 2**26:
        pytest.skip("this file system has no sparse files")
    shared = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
        intermediate_size num_experts num_experts_per_tok moe_intermediate_size"""
    fields = {name: getattr(config, name) for name in shared.split()}
    fields |= {"model_type": "lfm2_moe", "layer_types": list(config.layer_types)}
    (folder / "config.json").write_text(json.dumps({**fields, "eos_token_id": 7}))
    return config


def stream_24b(folder: Path, share: float) -> tuple[int, int]:
    """Stream a 24B checkpoint into nothing, reading a random ``share`` of its chunks.

    Returns:
        The bytes handed out, and the most that the process grew by while it read, in bytes.
    """
    config, rng = sparse_24b(folder), random.Random(0)
    statm = os.open("/proc/self/statm", os.O_RDONLY)

    def resident() -> int:
        return int(os.pread(statm, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    checkpoint = open_checkpoint(folder)
    assert read_config(checkpoint) == config
    tensors = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    placements = place_tensors(config, tensors, str(folder))
    streamed = peak = 0

    def drop(placement: Placement, start: int, rows: torch.Tensor) -> None:
        nonlocal streamed, peak
        streamed += rows.numel() * rows.element_size()
        if placement.kind == "embedding" or rng.random() < share:
            # touches every page, as a copy to a device does
            assert not bool(rows.view(torch.uint8).any())
            peak = max(peak, resident() - before)

    stream_tensors(checkpoint, placements, drop)
    os.close(statm)
    return streamed, peak


def test_streaming_24b_takes_little_host_memory(tmp_path: Path) -> None:
    streamed, peak = stream_24b(tmp_path, 0.005)
    # everything in bf16 but 38 expert biases
    assert streamed == 2 * PUBLIC_CONFIGS["LFM2-24B-A2B"].num_parameters + 2 * 38 * 64
    # a chunk of 64 MiB, what `any` makes of it, and 7,610 headers; the promise is 1 GB
    assert 2**26 <= peak < 2**28
