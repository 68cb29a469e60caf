"""Reads tokenizer.json and tokenizer_config.json, and refuses files that could do harm later.

Knows the files; `lfm2_gpu.tokenizer` knows what the tokens are for.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_gpu.errors import Lfm2Error, ModelFileError
from lfm2_gpu.files import open_regular, read_json

if TYPE_CHECKING:
    import tokenizers

__all__ = ["library_errors", "read_special_tokens", "read_tokenizer", "tokens_by_id"]

_MAX_FILE_BYTES = 2**28
_MAX_CONFIG_BYTES = 2**24
# ids index tables, so one absurd id must not size them; the largest LFM2 vocabulary is 128,000
_MAX_VOCAB = 2**20


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """Load one tokenizer.json.

    Raises:
        ModelFileError: The file is missing, damaged, or holds a pattern that could take
            exponential time on some text.
    """
    import tokenizers

    with open(open_regular(path), "rb") as file:
        raw = file.read(_MAX_FILE_BYTES + 1)
    if len(raw) > _MAX_FILE_BYTES:
        raise ModelFileError(f"{path}: is over {_MAX_FILE_BYTES} bytes")
    with library_errors(str(path)):
        backend = tokenizers.Tokenizer.from_buffer(raw)
    _refuse_slow_patterns(backend, str(path))
    return backend


@contextlib.contextmanager
def library_errors(source: str) -> Iterator[None]:
    """Turn what `tokenizers` raises on a bad file into `ModelFileError`."""
    try:
        yield
    except (Lfm2Error, KeyboardInterrupt, SystemExit):
        raise
    # it raises bare Exception for most, and a panic of its Rust code is no Exception at all
    except BaseException as error:
        raise ModelFileError(f"{source}: is no usable tokenizer: {str(error)[:500]}") from error


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Texts by role (``bos_token``, ``eos_token``, ...) as a checkpoint's files name them.

    Raises:
        ModelFileError: A file is there but damaged.
    """
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (directory / name).exists():
            continue
        for role, value in read_json(directory / name, max_bytes=_MAX_CONFIG_BYTES).items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                named[role] = text
    return named


def tokens_by_id(vocab: Mapping[str, int], source: str) -> list[str | None]:
    """Invert a vocabulary; ``None`` marks an id that no token has.

    Raises:
        ModelFileError: The vocabulary is empty, gives an id twice, or has an absurdly high one.
    """
    if not vocab:
        raise ModelFileError(f"{source}: has no tokens")
    highest = max(vocab.values())
    if highest >= _MAX_VOCAB:
        raise ModelFileError(f"{source}: token id {highest}, want ids below {_MAX_VOCAB}")
    tokens: list[str | None] = [None] * (highest + 1)
    for text, i in vocab.items():
        if tokens[i] is not None:
            raise ModelFileError(f"{source}: id {i} is both {tokens[i]!r} and {text!r}")
        tokens[i] = text
    return tokens


def _refuse_slow_patterns(backend: tokenizers.Tokenizer, source: str) -> None:
    """Refuse a file whose regular expressions could take exponential time on some text."""
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        state = json.loads(part.__getstate__()) if part else None
        for pattern in _regexes(state):
            if _repeats_a_choice(pattern):
                raise ModelFileError(
                    f"{source}: pattern {pattern[:200]!r} repeats a group that repeats or chooses, "
                    "which can take exponential time"
                )


def _regexes(state: Any) -> Iterable[str]:
    if isinstance(state, dict):
        if isinstance(state.get("Regex"), str):
            yield state["Regex"]
        state = list(state.values())
    if isinstance(state, list):
        for item in state:
            yield from _regexes(item)


_REGEX_PART = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|\(\??|\)|\{\d*,?\d*\}|.", re.DOTALL
)


def _repeats_a_choice(pattern: str) -> bool:
    """Whether a group without bound on its repeats holds a quantifier or an alternative."""
    holds_choice = [False]
    closed_choice = False
    for part in _REGEX_PART.findall(pattern):
        unbounded = part in ("*", "+") or (part[0] == "{" and part.endswith(",}"))
        if unbounded and closed_choice:
            return True
        closed_choice = False
        if part[0] == "(":
            holds_choice.append(False)
        elif part == ")" and len(holds_choice) > 1:
            closed_choice = holds_choice.pop()
            holds_choice[-1] |= closed_choice
        elif part in ("?", "|") or unbounded or (part[0] == "{" and len(part) > 2):
            holds_choice[-1] = True
    return False
