"""Render dialogues with the chat template that ships with the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSETS = Path(__file__).resolve().parents[2] / "lfm2_gpu" / "assets" / "pocket"
BOS = "<|startoftext|>"

Message = dict[str, Any]


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((ASSETS / "chat_template.jinja").read_text("utf-8"))


def render(
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a dialogue, starting with the begin-of-text token."""
    return _template().render(
        messages=messages,
        tools=tools,
        bos_token=BOS,
        add_generation_prompt=add_generation_prompt,
    )
