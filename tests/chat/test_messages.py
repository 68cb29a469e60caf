"""Messages, tool calls and thinking: what is accepted, and that nothing is lost."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest

from chats import ARGUMENTS, CALL, USER, text_of
from lfm2_gpu.chat import FALLBACK_TEMPLATES, ChatTemplate
from lfm2_gpu.errors import InvalidRequest
from lfm2_gpu.tokenizer import Tokenizer


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), {}, "", None])
def test_tool_calls_are_printed_by_every_template(fallback: ChatTemplate, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"n": 1}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, other]}
    text = text_of(fallback.render([USER, message, {"role": "tool", "content": "3"}]))
    found = re.findall(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", text)
    assert len(found) == 1
    calls = ast.parse(found[0], mode="eval").body
    assert isinstance(calls, ast.List)
    first, second = calls.elts
    assert isinstance(first, ast.Call)
    assert ast.unparse(second) == "g(n=1)"
    read = {keyword.arg: ast.literal_eval(keyword.value) for keyword in first.keywords}
    assert read == (ARGUMENTS if arguments in (ARGUMENTS, json.dumps(ARGUMENTS)) else {})


def test_calls_stand_between_thought_and_answer(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(FALLBACK_TEMPLATES["lfm2"], tokenizer)
    call = {"name": "f", "arguments": {"q": 'a "b"\n'}}
    message = {"role": "assistant", "content": "<think>x</think>Done.", "tool_calls": [call]}
    text = text_of(template.render([USER, message], add_generation_prompt=False))
    calls = '<|tool_call_start|>[f(q="a \\"b\\"\\n")]<|tool_call_end|>'
    assert text.endswith(f"assistant\n<think>x</think>{calls}Done.<|im_end|>\n")
    # a client that sent the model's text as it was gets it back as it was
    message["content"] = f"{calls}Done."
    text = text_of(template.render([USER, message], add_generation_prompt=False))
    assert text.endswith(f"assistant\n{calls}Done.<|im_end|>\n")


@pytest.mark.parametrize("field", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_is_printed_by_every_template(fallback: ChatTemplate, field: str) -> None:
    answer = {"role": "assistant", "content": "3", field: "hm"}
    text = text_of(fallback.render([USER, answer], add_generation_prompt=False))
    assert text.endswith("assistant\n<think>hm</think>3<|im_end|>\n")


def test_which_thinking_is_kept(tokenizer: Tokenizer) -> None:
    def thoughts(kind: str, **options: bool) -> list[str]:
        template = ChatTemplate(FALLBACK_TEMPLATES[kind], tokenizer)
        said = [{"role": "assistant", "content": f"<think>{i}</think>  a"} for i in range(3)]
        chat = [USER, said[0], USER, said[1], said[2]]
        return re.findall(r"<think>(\d)</think>", text_of(template.render(chat, **options)))

    assert thoughts("lfm2") == ["0", "1", "2"]
    assert thoughts("lfm2.5") == ["2"]
    assert thoughts("lfm2.5", keep_past_thinking=True) == ["0", "1", "2"]
    assert thoughts("lfm2.5-2026") == ["1", "2"]
    assert thoughts("lfm2.5-2026", preserve_thinking=True) == ["0", "1", "2"]


def test_text_parts_are_joined(fallback: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    chat = [{"role": "developer", "content": "Be brief."}, {**USER, "content": parts}]
    plain = [{"role": "system", "content": "Be brief."}, USER]
    assert fallback.render(chat) == fallback.render(plain)


def test_empty_fields_that_clients_send_back(fallback: ChatTemplate) -> None:
    answer = {"role": "assistant", "content": "3", "refusal": None, "tool_calls": [], "audio": None}
    assert fallback.render([USER, answer]) == fallback.render(
        [USER, {"role": "assistant", "content": "3"}]
    )


class Text(str):
    """A string that says something else when it is printed."""

    def __str__(self) -> str:
        return "else"


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "non-empty list"),
        ("Hi", "messages", "non-empty list"),
        (USER, "messages", "non-empty list"),
        ([USER, "Hi"], "messages[1]", "want a mapping"),
        ([{"content": "Hi"}], "messages[0].role", "NoneType, want one of system"),
        ([{**USER, "role": "root"}], "messages[0].role", "'root', want one of system"),
        ([{**USER, "role": ["user"]}], "messages[0].role", "list, want one of"),
        ([{"role": "user"}], "messages[0].content", "want a string or a list of text parts"),
        ([{**USER, "content": None}], "messages[0].content", "want a string or a list"),
        ([{**USER, "content": 5}], "messages[0].content", "int, want a string or a list"),
        ([{**USER, "content": {"a": 1}}], "messages[0].content", "dict, want a string or"),
        ([{**USER, "content": ["a"]}], "messages[0].content[0].type", "want 'text'"),
        (
            [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            "messages[0].content[1].type",
            "'image_url', want 'text'",
        ),
        ([{**USER, "content": [{"type": "text"}]}], "messages[0].content[0].text", "want a string"),
        ([{**USER, "colour": 1}], "messages[0].colour", "unknown field 'colour'"),
        ([{**USER, "name": 1}], "messages[0].name", "int, want a string"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0]", "role user, want assistant"),
        ([{"role": "assistant"}], "messages[0].content", "want a string"),
        (
            [{"role": "assistant", "tool_calls": {"a": 1}}],
            "messages[0].tool_calls",
            "dict, want a list",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}],
            "messages[0].tool_calls[0].function.name",
            "NoneType, want a string",
        ),
    ],
)
def test_messages_that_are_wrong(
    fallback: ChatTemplate, messages: Any, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as error:
        fallback.render(messages)
    assert error.value.param == param


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "arguments",
    [
        *("{", "[1]", '{"a": NaN}', "[" * 10_000, '{"a": ' + "9" * 5_000 + "}", {1: 2}, 7),
        *({"a": value} for value in ({3}, float("inf"), 10**5_000, nested(100), object())),
    ],
)
def test_arguments_that_are_no_json_object(fallback: ChatTemplate, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidRequest) as error:
        fallback.render([USER, {"role": "assistant", "tool_calls": [call]}])
    assert str(error.value.param).startswith("messages[1].tool_calls[0].function.arguments")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("tools", [{"a": 1}, "tools", [1], [{"a": float("nan")}], [{"a": b"x"}]])
def test_tools_that_are_wrong(fallback: ChatTemplate, tools: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        fallback.render([USER], tools=tools)
    assert str(error.value.param).startswith("tools")


def test_strings_are_taken_at_their_value(fallback: ChatTemplate) -> None:
    chat = [{"role": "user", "content": Text("Hi")}]
    assert fallback.render(chat) == fallback.render([USER])
