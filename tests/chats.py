"""Messages, tools and helpers that the tests of chats share."""

from __future__ import annotations

import re

from tiny_tokenizer import SPECIAL_TOKENS

Segments = list[tuple[str, bool]]

USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Zürich", "n": 2, "ok": True, "x": None, "l": ["a", 1], "d": {"k": "v"}}
CALL = {"id": "c0", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}


def text_of(segments: Segments) -> str:
    return "".join(text for text, _ in segments)


def trusted_controls(segments: Segments) -> list[str]:
    pattern = "|".join(map(re.escape, SPECIAL_TOKENS))
    return [found for text, trusted in segments if trusted for found in re.findall(pattern, text)]
