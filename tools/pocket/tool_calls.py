"""Dialogues in which the assistant calls a tool, and the check of such a call."""

from __future__ import annotations

import ast
import json
import random
from dataclasses import dataclass
from typing import Any

from .template import Message
from .tool_table import TOOLS, Tool
from .values import Value, Values

# of all question templates in table order, one in ten never occurs in training
HELD_OUT_TEMPLATE_STEP = 10

_WRAPPERS = (
    "{}", "Please {}.", "{}, please.", "Can you {}?", "Could you {}?", "I want you to {}.",
    "Hi, {} for me.", "I need you to {}.", "Would you {}?", "{}!",
)  # fmt: skip
_INTEGER_KINDS = frozenset({"int", "small_int", "percent", "celsius"})


@dataclass(frozen=True)
class Request:
    """A question that one of the offered tools answers, and the call that is right."""

    offered: tuple[Tool, ...]
    tool: Tool
    question: str
    arguments: dict[str, Value]


def templates(tool: Tool, held_out: bool) -> list[str]:
    """Return the question templates of a tool that are (not) held out; it can be empty."""
    position = 0
    for earlier in TOOLS:
        if earlier is tool:
            break
        position += len(earlier.requests) + len(earlier.questions)
    kept = []
    for i, text in enumerate((*tool.requests, *tool.questions)):
        out = (position + i) % HELD_OUT_TEMPLATE_STEP == HELD_OUT_TEMPLATE_STEP // 2
        if out == held_out:
            kept.append(text)
    return kept


def make_request(
    rng: random.Random, values: Values, held_template: bool = False, held_values: bool = False
) -> Request:
    """Draw a request; by default one that training may see.

    Args:
        rng: draws tool, template and wrapper.
        values: draws the arguments.
        held_template: take one of the question templates kept from training.
        held_values: take only argument values kept from this tool's training questions.
    """
    choices = [tool for tool in TOOLS if templates(tool, held_template)]
    tool = rng.choice(choices)
    others = [other for other in TOOLS if other is not tool]
    offered = [tool, *rng.sample(others, rng.randint(1, 2))]
    rng.shuffle(offered)
    arguments = {
        name: values.draw(tool.name, kind, held_values) for name, kind in tool.arguments.items()
    }
    template = rng.choice(templates(tool, held_template))
    question = template.format(**arguments)
    if template in tool.requests:
        question = rng.choice(_WRAPPERS).format(question)
    if rng.random() < 0.7:
        question = question[0].upper() + question[1:]
    return Request(tuple(offered), tool, question, arguments)


def schema(tool: Tool) -> dict[str, Any]:
    """Return a tool as the JSON object that goes into the system prompt."""
    properties = {name: {"type": _json_type(kind)} for name, kind in tool.arguments.items()}
    return {
        "name": tool.name,
        "description": tool.description,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": list(tool.arguments),
        },
    }


def _json_type(kind: str) -> str:
    if kind in _INTEGER_KINDS:
        return "integer"
    return "number" if kind == "amount" else "string"


def dialogue(request: Request, values: Values) -> list[Message]:
    """Return the whole exchange: question, call, the tool's answer, the final answer."""
    tool = request.tool
    result = {name: values.draw(tool.name, kind, None) for name, kind in tool.result.items()}
    call = {"function": {"name": tool.name, "arguments": request.arguments}}
    return [
        {"role": "user", "content": request.question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
        {"role": "assistant", "content": tool.answer.format(**request.arguments, **result)},
    ]


@dataclass(frozen=True)
class Verdict:
    """What a generated call got right; each implies the one before."""

    parsed: bool
    right_tool: bool
    right_arguments: bool


def check_call(text: str, request: Request) -> Verdict:
    """Compare generated text with the call that the request wants.

    Args:
        text: what the model wrote, special tokens included, up to its end token.
        request: the question and its right call.
    """
    _, start, rest = text.partition("<|tool_call_start|>")
    body, end, _ = rest.partition("<|tool_call_end|>")
    if not start or not end:
        return Verdict(False, False, False)
    try:
        parsed = ast.parse(body.strip(), mode="eval").body
        calls = parsed.elts if isinstance(parsed, ast.List) else [parsed]
        if len(calls) != 1 or not isinstance(calls[0], ast.Call):
            return Verdict(False, False, False)
        name = ast.unparse(calls[0].func)
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in calls[0].keywords}
    except (SyntaxError, ValueError):
        return Verdict(False, False, False)
    right_tool = name == request.tool.name
    return Verdict(True, right_tool, right_tool and arguments == request.arguments)
