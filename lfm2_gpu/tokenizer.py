"""Text to token ids and back, from a checkpoint's tokenizer.json. Knows no model and no chat.

The `tokenizers` library splits text and merges pieces; this module decides which text may become
a control token, and turns ids into bytes itself, because only bytes can be streamed without ever
splitting a character.

A control token is an added token that the file marks special, that is spelled ``<|...|>``, or that
tokenizer_config.json names. It comes out of `encode` only where the caller says that the text is
trusted; everywhere else ``<|im_end|>`` is eight ordinary characters. Other added tokens (a word, a
think tag) are recognised in any text, as the checkpoint was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_gpu.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer
from lfm2_gpu.errors import InvalidRequest, ModelFileError
from lfm2_gpu.tokenizer_file import (
    library_errors,
    read_special_tokens,
    read_tokenizer,
    tokens_by_id,
)

if TYPE_CHECKING:
    import tokenizers

__all__ = ["SpecialIds", "Tokenizer"]

_CONTROL_SHAPE = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the tokens that others ask for by role; ``None`` where the vocabulary lacks one."""

    bos: int | None
    eos: int | None
    pad: int | None
    endoftext: int | None
    im_start: int | None
    im_end: int | None
    tool_list_start: int | None
    tool_list_end: int | None
    tool_call_start: int | None
    tool_call_end: int | None
    tool_response_start: int | None
    tool_response_end: int | None
    think_start: int | None
    think_end: int | None


_SPELLING = {
    "bos": "<|startoftext|>",
    "eos": "<|im_end|>",
    "pad": "<|pad|>",
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "tool_list_start": "<|tool_list_start|>",
    "tool_list_end": "<|tool_list_end|>",
    "tool_call_start": "<|tool_call_start|>",
    "tool_call_end": "<|tool_call_end|>",
    "tool_response_start": "<|tool_response_start|>",
    "tool_response_end": "<|tool_response_end|>",
    "think_start": "<think>",
    "think_end": "</think>",
}


class Tokenizer:
    """Encodes and decodes as the checkpoint's tokenizer does. Immutable, safe from many threads.

    Attributes:
        vocab_size: Highest id + 1. The embedding may have more rows: no token stands for those.
        holes: Ids below ``vocab_size`` that stand for no token.
        ids: Ids by role.
        special_tokens: Texts by role, as templates name them: ``bos_token``, ``eos_token``, ...
        control_tokens: Texts of all control tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        *,
        source: str = "tokenizer",
    ) -> None:
        self._backend = backend
        self._source = source
        self._id_of = backend.get_vocab(with_added_tokens=True)
        self._tokens = tokens_by_id(self._id_of, source)
        self.vocab_size = len(self._tokens)
        self.holes = frozenset(i for i, text in enumerate(self._tokens) if text is None)

        named = dict(special_tokens or {})
        for role in ("bos", "eos", "pad"):
            if _SPELLING[role] in self._id_of:
                named.setdefault(f"{role}_token", _SPELLING[role])
        self.special_tokens: Mapping[str, str] = named
        spelling = _SPELLING | {
            role: named[f"{role}_token"]
            for role in ("bos", "eos", "pad")
            if f"{role}_token" in named
        }
        self.ids = SpecialIds(**{role: self._id_of.get(text) for role, text in spelling.items()})

        self._added = backend.get_added_tokens_decoder()
        control = {
            i: token
            for i, token in self._added.items()
            if token.special
            or token.content in named.values()
            or _CONTROL_SHAPE.fullmatch(token.content)
        }
        self._control_ids = frozenset(control)
        self.control_tokens = frozenset(token.content for token in control.values())
        self._control_pattern = _pattern_of(control.values())
        self._make_control_tokens_text(control.values())
        self._prefix, self._suffix = self._post_processed()
        self._is_byte_level = _is_byte_level(backend)
        self._bytes: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json of a checkpoint, and the roles that tokenizer_config.json names.

        Raises:
            ModelFileError: A file is missing, damaged or of an unsupported kind.
        """
        directory = Path(directory)
        return cls.from_file(directory / "tokenizer.json", read_special_tokens(directory))

    @classmethod
    def from_file(
        cls, path: str | Path, special_tokens: Mapping[str, str] | None = None
    ) -> Tokenizer:
        """Read one tokenizer.json; ``special_tokens`` gives texts by role, ``bos_token`` and so on.

        Raises:
            ModelFileError: The file is missing, damaged or of an unsupported kind.
        """
        with library_errors(str(path)):
            return cls(read_tokenizer(path), special_tokens, source=str(path))

    def _make_control_tokens_text(self, control: Iterable[tokenizers.AddedToken]) -> None:
        """Switch the backend to plain text: from here on it never produces a control token."""
        import tokenizers

        unmarked = [token.content for token in control if not token.special]
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in unmarked]
        )
        self._backend.encode_special_tokens = True
        # a saved limit or padding would silently change prompts
        self._backend.no_truncation()
        self._backend.no_padding()
        # what stands for unknown text also stands for its own spelling, and means the same there
        for text in self.control_tokens - {getattr(self._backend.model, "unk_token", None)}:
            if self._id_of[text] in self._encode_text(text):
                raise ModelFileError(
                    f"{self._source}: merges spell the control token {text!r}, so ordinary text "
                    "cannot be told from it"
                )

    def _post_processed(self) -> tuple[list[int], list[int]]:
        """Ids that the file's post-processor puts before and after a text."""
        candidates = ["a", *(text for text in self._tokens if text not in self.control_tokens)]
        probe = next((text for text in candidates if text and self._encode_text(text)), "")
        plain = self._encode_text(probe)
        full = self._backend.encode(probe, add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        raise ModelFileError(
            f"{self._source}: the post-processor turns {plain} into {full}, want ids added before "
            "or after it"
        )

    def encode(
        self, text: str, *, add_special_tokens: bool, allow_special: bool = False
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: Any text.
            add_special_tokens: Add what the file's post-processor adds (LFM2: the start token). A
                start that is there already is not doubled. Rendered chats carry their own.
            allow_special: The text is trusted: spelled control tokens in it are control tokens.

        Raises:
            InvalidRequest: ``text`` is no string, or holds half of a surrogate pair.
        """
        return self.encode_segments([(text, allow_special)], add_special_tokens=add_special_tokens)

    def encode_segments(
        self, segments: Iterable[tuple[str, bool]], *, add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text given as ``(text, trusted)`` pieces.

        Only a control token spelled inside one trusted piece is a control token. All other text is
        joined before it is encoded, so that where the pieces were cut does not change the ids.

        Raises:
            InvalidRequest: As for `encode`.
        """
        ids: list[int] = []
        pending: list[str] = []
        for text, trusted in segments:
            if not isinstance(text, str):
                raise InvalidRequest(f"text is {type(text).__name__}, want a string")
            start = 0
            for match in self._control_pattern.finditer(text) if trusted else ():
                pending.append(text[start : match.start()])
                ids += self._encode_text("".join(pending))
                pending.clear()
                spelled = match.group()
                ids.append(
                    self._id_of[spelled if spelled in self.control_tokens else spelled.strip()]
                )
                start = match.end()
            pending.append(text[start:])
        ids += self._encode_text("".join(pending))
        if not add_special_tokens:
            return ids
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            return [*ids, *self._suffix]
        return [*self._prefix, *ids, *self._suffix]

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise InvalidRequest(
                f"text holds half of a surrogate pair, {text[at]!r}, at character {at}"
            ) from error
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            InvalidRequest: An id stands for no token.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh `IncrementalDetokenizer` for the ids of one generated sequence."""
        if self._is_byte_level:
            visible = self._visible_bytes if skip_special_tokens else self.token_bytes
            return ByteDetokenizer(visible)
        return WindowDetokenizer(self._window_decode(skip_special_tokens))

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._control_ids else self.token_bytes(token_id)

    def _window_decode(self, skip: bool) -> Callable[[Sequence[int]], str]:
        def decode(token_ids: Sequence[int]) -> str:
            for token_id in token_ids:
                self._token(token_id)
            shown = [i for i in token_ids if not (skip and i in self._control_ids)]
            return str(self._backend.decode(shown, skip_special_tokens=False))

        return decode

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, in UTF-8: maybe a part of a character.

        Raises:
            InvalidRequest: The id stands for no token.
        """
        text = self._token(token_id)
        known = self._bytes[token_id]
        if known is None:
            if token_id in self._added:
                known = self._added[token_id].content.encode()
            elif self._is_byte_level:
                known = _alphabet_bytes(text)
            else:
                known = self._backend.decode([token_id], skip_special_tokens=False).encode()
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """The token alone as text, for reports; a part of a character reads as U+FFFD.

        Raises:
            InvalidRequest: The id stands for no token.
        """
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _token(self, token_id: int) -> str:
        text = self._tokens[token_id] if 0 <= token_id < self.vocab_size else None
        if text is None:
            raise InvalidRequest(
                f"token id {token_id} stands for no token, want one in [0, {self.vocab_size})"
                + (f" outside {len(self.holes)} unused ids" if self.holes else ""),
                param="token_ids",
            )
        return text

    def token_id(self, text: str) -> int | None:
        """Id of a token by its spelling in the file, if there is one."""
        return self._id_of.get(text)

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which ``skip_special_tokens`` leaves out of texts."""
        return token_id in self._control_ids


def _pattern_of(control: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Finds control tokens, the longest first at each place, with the spaces they swallow."""

    def one(token: tokenizers.AddedToken) -> str:
        text = re.escape(token.content)
        if token.single_word:
            text = rf"(?<!\w){text}(?!\w)"
        return (r"\s*" if token.lstrip else "") + text + (r"\s*" if token.rstrip else "")

    ordered = sorted(control, key=lambda token: -len(token.content))
    return re.compile("|".join(map(one, ordered)) or "(?!)")


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    while state.get("type") == "Sequence" and len(state["decoders"]) == 1:
        state = state["decoders"][0]
    return bool(state.get("type") == "ByteLevel")


class _Alphabet(dict[int, int]):
    """GPT-2's spelling of bytes: code point to byte; others map past a byte, which cannot encode.

    Bytes that print stand for themselves, the rest for U+0100 and up, in order.
    """

    def __init__(self) -> None:
        prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = sorted(set(range(0x100)) - set(prints))
        super().__init__({byte: byte for byte in prints})
        self.update((0x100 + n, byte) for n, byte in enumerate(hidden))

    def __missing__(self, code: int) -> int:
        return 0xFFFD


_ALPHABET = _Alphabet()


def _alphabet_bytes(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        # not spelled in the alphabet, so it can only mean itself
        return token.encode()
