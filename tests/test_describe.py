"""The description of a checkpoint: right figures, no weights read, no torch loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import build, edit_config
from lfm2_gpu.describe import describe, inspect_checkpoint
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.loader import load_model
from support import python_lines


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"max_shard_size": "300KB"}
    return build(tmp_path_factory.mktemp("moe"), 0, moe=True, save_options=options)


def test_figures_are_the_loaded_models(moe: Path) -> None:
    report, model = inspect_checkpoint(str(moe)), load_model(moe, device="cpu")
    assert report.bytes == model.parameter_bytes()
    assert sum(report.parameters.values()) == model.config.num_parameters
    assert report.config == model.config
    assert report.dtypes == {"F32": 4 * model.config.num_parameters}
    assert report.files == {file.name: file.stat().st_size for file in moe.glob("*.safetensors")}


def test_a_head_of_its_own_is_counted_though_the_config_ties_it(tmp_path: Path) -> None:
    folder = build(tmp_path, 0)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": -tensors["model.embed_tokens.weight"]},
        folder / "model.safetensors",
    )
    report, model = inspect_checkpoint(str(folder)), load_model(folder, device="cpu")
    assert not report.config.tie_word_embeddings
    assert report.bytes == model.parameter_bytes()


def test_text(moe: Path) -> None:
    text = describe(str(moe))
    for line in (
        f"path          {moe}",
        "architecture  lfm2_moe, 4 layers (2 conv, 2 attention)",
        "hidden size   96, conv of 3 taps",
        "attention     3 heads, 1 KV heads, head dim 32, RoPE base 1e+06",
        "FFN           8 experts of 64, 2 per token; dense, 128, in the first 1 layers",
        "vocabulary    128, head tied",
        "context       4096 tokens by default",
        "KV cache      256 bytes per token in 16 bits",
        "dtype         F32 2.5 MB",
    ):
        assert line in text.splitlines()
    last = text.splitlines()[-1].split()
    config = load_model(moe, device="cpu").config
    assert last == ["total", f"{config.num_parameters:,}", f"{4 * config.num_parameters:,}"]


def test_dense_text(tmp_path: Path) -> None:
    text = describe(str(build(tmp_path / "x", 0, tie_word_embeddings=False)))
    assert "FFN           dense, 128" in text
    assert "vocabulary    128, head its own" in text
    assert "experts" not in text


def test_what_cannot_be_loaded_cannot_be_described(tmp_path: Path) -> None:
    folder = build(tmp_path / "x", 0)
    edit_config(folder, vocab_size=100)
    with pytest.raises(
        ModelFileError, match=r"embed_tokens.weight is \[128, 96\], want \[100, 96\]"
    ):
        describe(str(folder))


def test_needs_no_torch(moe: Path) -> None:
    code = (
        "import sys; from lfm2_gpu.describe import describe; "
        f"describe({str(moe)!r}); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert python_lines(code) == ["False False"]
