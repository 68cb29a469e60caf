"""Makes tokenizers of LFM2's family in miniature: its special tokens, splitting and template."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from lfm2_gpu.chat import FALLBACK_TEMPLATES

# ids are list positions, as in the 65k vocabulary
SPECIAL_TOKENS = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEXT = """\
A river is a natural stream of water that flows across the land towards another river, a lake or
the sea. Small rivers are called streams, brooks, creeks or rills; there are no fixed words for the
size of a river, although in some countries a stream may be defined by its width. Rivers are an
important part of the water cycle: rain falls on hills and mountains, collects in a basin, sinks
into the ground, returns at springs and runs downhill until it reaches the ocean. People have always
lived beside rivers. They drink the water, catch fish, move goods by boat, turn mills and fields
green, and build bridges from one bank to the other. What does a river do when it floods? It leaves
mud behind, and the mud feeds the plain. def weather(city, days=3): return {"city": city, "n": days}
user assistant system tool List of tools: type function name parameters properties string integer
Der Fluß fließt über Zürich. L'été, la rivière est très calme. 日本語のテスト 川は海へ流れる 🌊🚣
"""


def save_tiny_tokenizer(directory: Path, vocab_size: int = 512) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja for a test checkpoint.

    Special tokens have the ids of the 65k vocabulary: 0 pad, 1 start of text, 6 and 7 the marks of
    a turn. Every byte is a token, so any text can be encoded. The files depend on ``vocab_size``
    alone; `transformers.AutoTokenizer` reads them too.

    Raises:
        ValueError: ``vocab_size`` is out of what the training text gives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_trained(vocab_size), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = FALLBACK_TEMPLATES["lfm2"]
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


@functools.cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = _TEXT.split()
    # pairs written as one word, only so that larger vocabularies find something to merge
    pairs = [first + second for first, second in itertools.pairwise(words)]
    tokenizer.train_from_iterator([_TEXT, " ".join(pairs)], trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, want a size near {size}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 1)]
    )
    return tokenizer.to_str()


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object], source: Path) -> Path:
    """Save the tokenizer.json of ``source`` in ``directory`` with something changed in it."""
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (directory / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return directory
