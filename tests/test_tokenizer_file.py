"""Tokenizer files that are unusual, damaged or harmful."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.tokenizer import Tokenizer
from tiny_tokenizer import SPECIAL_TOKENS, rewrite, save_tiny_tokenizer


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_tokenizer(directory)
    return directory


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if tokenizer.is_special(i)]


def test_control_tokens_that_the_file_does_not_mark(tmp_path: Path, tiny_dir: Path) -> None:
    def unmark(data: dict[str, Any]) -> None:
        for token in data["added_tokens"]:
            token["special"] = False
        data["added_tokens"].append({**data["added_tokens"][0], "id": 512, "content": "<think>"})

    tokenizer = Tokenizer.from_dir(rewrite(tmp_path, unmark, tiny_dir))
    assert tokenizer.control_tokens == frozenset(SPECIAL_TOKENS)
    assert tokenizer.ids.think_start == 512
    ids = tokenizer.encode("<|im_end|><think>", add_special_tokens=False)
    # a think tag is an added token that any text may spell
    assert controls(tokenizer, ids) == []
    assert ids[-1] == 512
    assert tokenizer.decode([7, 512]) == "<think>"


def test_added_tokens_that_take_spaces(tmp_path: Path, tiny_dir: Path) -> None:
    def strip(data: dict[str, Any]) -> None:
        data["added_tokens"][7] |= {"lstrip": True, "rstrip": True}
        data["added_tokens"][6] |= {"single_word": True}

    rewrite(tmp_path, strip, tiny_dir)
    tokenizer = Tokenizer.from_dir(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a <|im_end|> \n b", "x<|im_start|> <|im_start|>", "<|im_start|>y"):
        ids = tokenizer.encode(text, add_special_tokens=True, allow_special=True)
        assert ids == reference.encode(text).ids


def test_a_saved_truncation_or_padding_is_not_applied(tmp_path: Path, tiny_dir: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "A river is a natural stream of water"
    expected = Tokenizer.from_dir(tiny_dir).encode(text, add_special_tokens=True)
    assert Tokenizer.from_dir(tmp_path).encode(text, add_special_tokens=True) == expected


def set_at(*path: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


SPLIT = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("model", "vocab", "river", value=2**31), "token id 2147483648, want ids below"),
        (set_at("model", "vocab", "river", value=7), "id 7 is both"),
        (set_at("model", "type", value="XPE"), "no usable tokenizer"),
        (set_at("model", value={"type": "WordLevel", "vocab": {}, "unk_token": "u"}), "."),
        (set_at("post_processor", "special_tokens", value={}), "no usable tokenizer"),
        (set_at("model", "continuing_subword_prefix", value="####"), "no usable tokenizer"),
        (set_at(*SPLIT, value=r"(\w+\s?)+$"), "exponential time"),
        (set_at(*SPLIT, value=r"(?:a|a)*b"), "exponential time"),
        (set_at(*SPLIT, value=r"((?:x{1,9}))+y"), "exponential time"),
        (set_at(*SPLIT, value=r"(a?){20,}"), "exponential time"),
        (set_at("normalizer", value={
            "type": "Replace", "pattern": {"Regex": "(.*)*x"}, "content": ""
        }), "exponential time"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, tiny_dir: Path, change: Any, message: str) -> None:
    rewrite(tmp_path, change, tiny_dir)
    with pytest.raises(ModelFileError, match=message) as error:
        Tokenizer.from_dir(tmp_path)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:ab)+c",
        r"\(+|[(a|b)*]+|\p{L}{2}+",
        r"(?i:'s|'t)?[^\r\n\p{L}\p{N}]?\p{L}+(?!\S)|\p{N}{1,3}",
    ],
)
def test_patterns_that_are_fine(tmp_path: Path, tiny_dir: Path, pattern: str) -> None:
    Tokenizer.from_dir(rewrite(tmp_path, set_at(*SPLIT, value=pattern), tiny_dir))


def test_missing_and_broken_files(tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: cannot be opened"):
        Tokenizer.from_dir(tmp_path)
    raw = (tiny_dir / "tokenizer.json").read_bytes()
    for damaged in (b"", b"{", raw[: len(raw) // 2], b"[]", b"\xff\xfe", b"null"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ModelFileError, match=r"tokenizer\.json: is no usable tokenizer"):
            Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(raw)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ModelFileError, match="not a regular file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_merges_that_spell_a_control_token_are_refused(tmp_path: Path) -> None:
    alphabet = {char: i for i, char in enumerate("<|im_end>")}
    merges = []
    grown = "<"
    for char in "|im_end|>":
        merges.append([grown, char])
        grown += char
        alphabet[grown] = len(alphabet)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [(a, b) for a, b in merges]))
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFileError, match="merges spell the control token"):
        Tokenizer.from_dir(tmp_path)
