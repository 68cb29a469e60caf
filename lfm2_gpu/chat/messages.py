"""Checks the messages and tools of a chat and brings them to the one form that templates get.

A message leaves here as a plain dict: ``role``, ``content`` as one string, and where present
``tool_calls`` with arguments as a dict, ``thinking`` (and its copy ``reasoning_content``), ``name``
and ``tool_call_id``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_gpu.errors import InvalidRequest

__all__ = ["call_text", "check_messages", "check_tools", "plain"]

# "developer" is the newer name of the same role
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_THINKING = ("thinking", "reasoning_content", "reasoning")
_TEXT_FIELDS = ("name", "tool_call_id")
_MAX_DEPTH = 64
_MAX_INT_BITS = 1024


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form above.

    ``content`` may be a string or a list of text parts, which are joined. An assistant's message
    with tool calls or thinking may leave it out. The arguments of a call may be a JSON string.

    Raises:
        InvalidRequest: A message is not of this form; ``param`` names the place.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest("messages is not a non-empty list", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(at, message, "a mapping with role and content")
    # clients send back what they received, fields that were empty included
    fields = {key: value for key, value in message.items() if value is not None and value != []}
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{at}.role", role, "one of " + ", ".join(_ROLES))
    result: dict[str, Any] = {"role": _ROLES[role]}

    thoughts = [fields.pop(name) for name in _THINKING if name in fields]
    calls = fields.pop("tool_calls", None)
    content = fields.pop("content", "" if role == "assistant" and (calls or thoughts) else None)
    result["content"] = _content(content, f"{at}.content")
    for name in _TEXT_FIELDS:
        if name in fields:
            result[name] = _text(fields.pop(name), f"{at}.{name}")
    if role != "assistant" and (calls or thoughts):
        raise InvalidRequest(
            f"{at} has tool calls or thinking and is of role {role}, want assistant", param=at
        )
    if thoughts:
        result["thinking"] = result["reasoning_content"] = _text(thoughts[0], f"{at}.thinking")
    if calls:
        result["tool_calls"] = _calls(calls, f"{at}.tool_calls")
    if fields:
        name = str(next(iter(fields)))
        raise InvalidRequest(f"{at} has an unknown field {name!r}", param=f"{at}.{name}")
    return result


def _content(content: object, at: str) -> str:
    if not isinstance(content, list):
        return _text(content, at, "a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise _wrong(f"{at}[{i}].type", kind, "'text', since the model reads nothing else")
        texts.append(_text(part.get("text"), f"{at}[{i}].text"))
    return "".join(texts)


def _text(value: object, at: str, wanted: str = "a string") -> str:
    if not isinstance(value, str):
        raise _wrong(at, value, wanted)
    return str.__str__(value)


def _calls(calls: object, at: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _wrong(at, calls, "a list")
    return [_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _call(call: object, at: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _wrong(at, call, "a mapping")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise _wrong(f"{at}.function", function, "a mapping with name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{at}.function.arguments is not JSON: {error}", param=f"{at}.function.arguments"
            ) from error
    if not isinstance(arguments, Mapping):
        raise _wrong(f"{at}.function.arguments", arguments, "a JSON object")
    result: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": _text(function.get("name"), f"{at}.function.name"),
            "arguments": plain(arguments, f"{at}.function.arguments"),
        },
    }
    if call.get("id") is not None:
        result["id"] = _text(call["id"], f"{at}.id")
    return result


def check_tools(
    tools: Sequence[Mapping[str, Any] | str] | None,
) -> list[dict[str, Any] | str] | None:
    """Tools as plain dicts, or as strings, which templates print as they are; ``None`` if none.

    Raises:
        InvalidRequest: A tool is neither, or cannot be written as JSON.
    """
    if not tools:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise _wrong("tools", tools, "a list")
    for i, tool in enumerate(tools):
        if not isinstance(tool, (str, Mapping)):
            raise _wrong(f"tools[{i}]", tool, "a mapping or a string")
    return [plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def plain(value: object, at: str, depth: int = 0) -> Any:
    """A copy in exact JSON types, whatever subclasses came in.

    Raises:
        InvalidRequest: A value has no JSON form, or is nested over 64 levels.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and value.bit_length() <= _MAX_INT_BITS:
        return int.__int__(value)
    if isinstance(value, float) and math.isfinite(value):
        return float.__float__(value)
    if depth == _MAX_DEPTH:
        raise InvalidRequest(f"{at} is nested over {_MAX_DEPTH} levels", param=at)
    if isinstance(value, Mapping):
        return {
            _text(key, at, "strings as keys"): plain(item, f"{at}.{key}"[:200], depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{at}[{i}]"[:200], depth + 1) for i, item in enumerate(value)]
    raise _wrong(at, value, "a JSON value of reasonable size")


def call_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls as the models write them: ``[name(arg="v", n=3), other()]``.

    Strings are double-quoted with JSON's escapes and the rest are Python literals, so the text
    reads back as the same values.
    """
    rendered = []
    for call in calls:
        function = call["function"]
        arguments = (f"{name}={_literal(value)}" for name, value in function["arguments"].items())
        rendered.append(f"{function['name']}({', '.join(arguments)})")
    return f"[{', '.join(rendered)}]"


def _literal(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def _wrong(at: str, value: object, wanted: str) -> InvalidRequest:
    if isinstance(value, str):
        shown = repr(value[:80])
    else:
        shown = repr(value) if isinstance(value, (bool, float)) else type(value).__name__
    return InvalidRequest(f"{at} is {shown}, want {wanted}", param=at)
