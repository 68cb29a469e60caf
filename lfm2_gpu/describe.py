"""What a checkpoint is, told from its config and headers: reads no weight, loads no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.formats import open_checkpoint
from lfm2_gpu.formats.base import Checkpoint
from lfm2_gpu.locate import locate
from lfm2_gpu.model.weights import CLASSES, fit_ff_size, place_tensors

__all__ = ["CheckpointReport", "describe", "inspect_checkpoint"]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What the headers say.

    Attributes:
        path: The directory.
        config: The model's shape.
        files: File names and their sizes in bytes.
        parameters: Stored elements by class (see ``weights.CLASSES``).
        bytes: Stored bytes by class.
        dtypes: Stored bytes by the format's dtype name.
    """

    path: Path
    config: ModelConfig
    files: dict[str, int]
    parameters: dict[str, int]
    bytes: dict[str, int]
    dtypes: dict[str, int]


def inspect_checkpoint(path_or_id: str) -> CheckpointReport:
    """Open a checkpoint, match its tensors with the model, and add up their sizes.

    Raises:
        ModelFileError: As ``loader.load_model``: what can be described can be loaded.
    """
    checkpoint = open_checkpoint(locate(path_or_id))
    try:
        return _report(checkpoint)
    finally:
        checkpoint.close()


def _report(checkpoint: Checkpoint) -> CheckpointReport:
    tensors = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    config = ModelConfig.from_dict(
        checkpoint.config,
        generation_config=checkpoint.generation_config,
        source=str(checkpoint.path / "config.json"),
    )
    config = fit_ff_size(config, {name: shape for name, (_, shape) in tensors.items()})
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        # which head is used is in the values: only here torch is needed
        from lfm2_gpu.loader import settle_head

        config = settle_head(config, checkpoint)
    parameters, sizes = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    dtypes: Counter[str] = Counter()
    for name, place in place_tensors(config, tensors, str(checkpoint.path)).items():
        info = checkpoint.tensors[name]
        elements = 1
        for dimension in info.shape:
            elements *= dimension
        parameters[place.kind] += elements
        sizes[place.kind] += info.num_bytes
        dtypes[info.dtype] += info.num_bytes
    files = {file.name: file.stat().st_size for file in checkpoint.files}
    return CheckpointReport(checkpoint.path, config, files, parameters, sizes, dict(dtypes))


def describe(path_or_id: str) -> str:
    """The report of ``inspect_checkpoint`` as text for a terminal.

    Raises:
        ModelFileError: As ``inspect_checkpoint``.
    """
    report = inspect_checkpoint(path_or_id)
    config = report.config
    names = list(report.files)
    shown = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} .. {names[-1]}"
    lines = [
        ("path", str(report.path)),
        ("files", f"{shown}, {_size(sum(report.files.values()))}"),
        ("architecture", f"{config.architecture}, {_layers(config)}"),
        ("hidden size", f"{config.hidden_size}, conv of {config.conv_L_cache} taps"),
        (
            "attention",
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, head dim "
            f"{config.head_dim}, RoPE base {config.rope_theta:g}",
        ),
        ("FFN", _ffn(config)),
        (
            "vocabulary",
            f"{config.vocab_size}, head {'tied' if config.tie_word_embeddings else 'its own'}",
        ),
        ("context", f"{config.default_max_model_len} tokens by default"),
        ("KV cache", f"{config.kv_bytes_per_token(2)} bytes per token in 16 bits"),
        ("parameters", _count(config)),
        ("dtype", ", ".join(f"{name} {_size(n)}" for name, n in sorted(report.dtypes.items()))),
    ]
    text = [f"{name:14}{value}" for name, value in lines]
    text += ["", f"{'class':14}{'parameters':>18}{'bytes':>20}"]
    for kind in CLASSES:
        if report.parameters[kind]:
            text.append(f"{kind:14}{report.parameters[kind]:>18,}{report.bytes[kind]:>20,}")
    total = sum(report.parameters.values()), sum(report.bytes.values())
    text.append(f"{'total':14}{total[0]:>18,}{total[1]:>20,}")
    return "\n".join(text)


def _layers(config: ModelConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers ({config.num_conv_layers} conv, "
        f"{config.num_attention_layers} attention)"
    )


def _ffn(config: ModelConfig) -> str:
    if not config.num_experts:
        return f"dense, {config.intermediate_size}"
    return (
        f"{config.num_experts} experts of {config.moe_intermediate_size}, "
        f"{config.num_experts_per_tok} per token; dense, {config.intermediate_size}, in the first "
        f"{config.num_dense_layers} layers"
    )


def _count(config: ModelConfig) -> str:
    if not config.num_experts:
        return f"{config.num_parameters:,}"
    return f"{config.num_parameters:,}, {config.num_active_parameters:,} active per token"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
