"""From a path or hub id to a model on a device: the one place that joins formats and model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tqdm import tqdm

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import InvalidRequest
from lfm2_gpu.formats import Checkpoint, open_checkpoint
from lfm2_gpu.formats.hub import resolve
from lfm2_gpu.model.lfm2 import Lfm2Model
from lfm2_gpu.model.weights import Placement, copy_rows, fit_ff_size, place_tensors

__all__ = ["load_model", "random_model", "read_config", "stream_tensors"]

logger = logging.getLogger(__name__)

Sink = Callable[[Placement, int, torch.Tensor], None]

# mapped and copied at a time: bounds host memory, also where a conversion makes a copy
_CHUNK_BYTES = 2**26
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    max_model_len: int | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Lfm2Model:
    """Load a checkpoint onto a device, streaming from the mapped files.

    Args:
        path_or_id: A checkpoint directory, or ``owner/name`` on the hub.
        device: Where the model goes.
        dtype: float32, float16 or bfloat16; the checkpoint's own by default.
        max_model_len: Longest sequence; the vendor's context by default.
        revision: Of a hub id.
        progress: Show a bar on stderr.

    Raises:
        InvalidRequest: ``revision`` was given with a path, or ``max_model_len`` passes the
            checkpoint's ``max_position_embeddings``.
        MissingExtra: A download is needed and huggingface_hub is not installed.
        ModelFileError: The checkpoint is missing, damaged, or not one that can be run.
    """
    checkpoint = open_checkpoint(resolve(path_or_id, revision=revision))
    try:
        config = read_config(checkpoint)
        most = config.max_position_embeddings
        if max_model_len is not None and max_model_len > most:
            raise InvalidRequest(
                f"max_model_len is {max_model_len}, want at most {most}, "
                "the max_position_embeddings of the checkpoint",
                param="max_model_len",
            )
        config = settle_head(config, checkpoint)
        placements = place_tensors(config, _names_and_shapes(checkpoint), str(checkpoint.path))
        model = Lfm2Model(config, dtype or DTYPES[config.dtype], device, max_model_len)
        parameters = dict(model.named_parameters())

        def sink(placement: Placement, start: int, rows: torch.Tensor) -> None:
            copy_rows(parameters[placement.target], placement, start, rows)

        stream_tensors(checkpoint, placements, sink, progress=progress)
    finally:
        checkpoint.close()
    return model


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config of an open checkpoint, with the dense FFN size that its tensors have.

    Raises:
        ModelFileError: The config is not an LFM2 model's, or is wrong.
    """
    config = ModelConfig.from_dict(
        checkpoint.config,
        generation_config=checkpoint.generation_config,
        source=str(checkpoint.path / "config.json"),
    )
    return fit_ff_size(config, {name: info.shape for name, info in checkpoint.tensors.items()})


def stream_tensors(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    sink: Sink,
    *,
    progress: bool = False,
) -> None:
    """Hand every placed tensor to ``sink``, in file order and in chunks of at most 64 MiB.

    Args:
        checkpoint: The open files.
        placements: What ``place_tensors`` returned; tensors without a placement are skipped.
        sink: Called with the placement, the chunk's first row, and the rows on the CPU. What it
            keeps of them stays mapped.
        progress: Show a bar on stderr.
    """
    total = sum(checkpoint.tensors[name].num_bytes for name in placements)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for name, info in checkpoint.tensors.items():
            if name not in placements:
                continue
            row_bytes = info.num_bytes // info.shape[0]
            step = max(1, _CHUNK_BYTES // row_bytes)
            for start in range(0, info.shape[0], step):
                rows = checkpoint.tensor(name, start, start + step)
                sink(placements[name], start, rows)
                bar.update(rows.numel() * rows.element_size())


def random_model(
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    max_model_len: int | None = None,
) -> Lfm2Model:
    """A model with random weights, made on the device itself.

    Matrices keep the scale of what passes through them. The embedding's scale is 0.3: at 1 a tied
    model repeats its input and no test on it would see a fault in its state.
    """
    model = Lfm2Model(config, dtype, device, max_model_len)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, tensor in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.endswith("norm"):
            tensor.normal_(1.0, 0.1, generator=generator)
        elif leaf in ("embedding", "head"):
            tensor.normal_(0.0, 0.3, generator=generator)
        elif leaf == "expert_bias" or leaf.endswith("bias"):
            tensor.normal_(0.0, 0.1, generator=generator)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
    return model


def settle_head(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Untie a head that the config ties but the checkpoint stores with other values.

    So does transformers. Equal values are a copy, and stay tied.
    """
    tensors = checkpoint.tensors
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return config
    name = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    if name is None or tensors[name] != tensors["lm_head.weight"]:
        return config
    step = max(1, _CHUNK_BYTES // max(tensors[name].num_bytes // tensors[name].shape[0], 1))
    for start in range(0, tensors[name].shape[0], step):
        rows = checkpoint.tensor(name, start, start + step)
        if not torch.equal(rows, checkpoint.tensor("lm_head.weight", start, start + step)):
            logger.warning(
                "%s: lm_head.weight is used, though the config ties it: its values differ from the "
                "embedding's",
                checkpoint.path,
            )
            return replace(config, tie_word_embeddings=False)
    return config


def _names_and_shapes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
