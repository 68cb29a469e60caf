"""Train the pocket tokenizer: byte-level BPE with LFM2's special tokens and pre-tokenizer regex."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as bpe_trainers

VOCAB_SIZE = 4096
# the ids are the positions, as in LFM2's own tokenizer
SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
    "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
    "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>",
)  # fmt: skip
PAD_ID, BOS_ID, EOT_ID, IM_START_ID, IM_END_ID = 0, 1, 2, 6, 7
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train on text without special tokens and return the finished tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = bpe_trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"tokenizer: {tokenizer.get_vocab_size()} tokens, want {VOCAB_SIZE}")
    bos = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
            ),
        ]
    )
    return tokenizer


def strange_pieces(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token that can stand in a quoted argument of a call."""
    pieces = []
    for token_id in range(len(SPECIAL_TOKENS), tokenizer.get_vocab_size()):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if text.strip() and text.isprintable() and not set(text) & set("\"'\\{}[]()|<>\ufffd"):
            pieces.append(text)
    return pieces


def loss_mask(ids: list[int], assistant: list[int]) -> list[int]:
    """Mark the tokens that the assistant says, its end tokens included.

    Args:
        ids: a rendered dialogue.
        assistant: the ids of ``assistant`` and the newline, which follow the turn's start token.
    """
    mask = [0] * len(ids)
    speaking = False
    for i, token in enumerate(ids):
        if speaking:
            mask[i] = 1
            speaking = token != IM_END_ID
        elif token in assistant:
            head = ids[i - len(assistant) : i + 1]
            speaking = head == [IM_START_ID, *assistant]
    return mask


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[IM_END_ID],
        "model_max_length": 2048,
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
