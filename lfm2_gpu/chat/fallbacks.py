"""Chat templates for checkpoints that ship none, one per generation of the LFM2 family.

They print what the vendor's templates of that generation print:

======== ============================ =============================== ==========================
         lfm2                         lfm2.5                          lfm2.5-2026
======== ============================ =============================== ==========================
models   LFM2                         LFM2.5 Instruct, Thinking, JP   LFM2.5 230M, 2.6B and MoE
tools    between list sentinels       plain list                      plain list
results  between response sentinels   plain                           plain
calls    (put into the content)       (put into the content)          printed after the content
thinking untouched                    kept in the last assistant turn kept after the last user turn
======== ============================ =============================== ==========================
"""

from __future__ import annotations

import re

__all__ = ["FALLBACK_TEMPLATES", "fallback_for"]

_HEAD = """\
{{- bos_token -}}
{%- set system = messages[0].content if messages[0].role == "system" else "" -%}
{%- set turns = messages[1:] if messages[0].role == "system" else messages -%}
{%- if system or tools -%}
    {{- "<|im_start|>system\\n" + system -}}
    {%- if tools -%}
        {{- ("\\n" if system else "") + "List of tools: LIST_START[" -}}
        {%- for tool in tools -%}
            {{- tool if tool is string else tool | tojson -}}
            {{- "" if loop.last else ", " -}}
        {%- endfor -%}
        {{- "]LIST_END" -}}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endif -%}
"""

_TAIL = """\
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""

_LFM2_TURNS = """\
{%- for message in turns -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- if message.role == "tool" -%}
        {{- "<|tool_response_start|>" + message.content + "<|tool_response_end|>" -}}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
"""

_LFM25_TURNS = """\
{%- set last = namespace(assistant=-1) -%}
{%- for message in turns -%}
    {%- if message.role == "assistant" -%}
        {%- set last.assistant = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- set content = message.content -%}
    {%- if message.role == "assistant" and loop.index0 != last.assistant
           and not keep_past_thinking and "</think>" in content -%}
        {%- set content = content.split("</think>")[-1] | trim -%}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
"""

_LFM25_2026_TURNS = """\
{%- macro literal(value) -%}
    {%- if value is string -%}
        {{- "'" + value + "'" -}}
    {%- else -%}
        {{- value | tojson if value is mapping else value | string -}}
    {%- endif -%}
{%- endmacro -%}
{%- set last = namespace(user=-1) -%}
{%- for message in turns -%}
    {%- if message.role == "user" -%}
        {%- set last.user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- set kept = preserve_thinking or loop.index0 > last.user -%}
    {%- set content = message.content -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- if message.thinking and kept -%}
            {{- "<think>" + message.thinking + "</think>" -}}
        {%- endif -%}
        {%- if not kept and "</think>" in content -%}
            {%- set content = content.split("</think>")[-1] | trim -%}
        {%- endif -%}
    {%- endif -%}
    {{- content -}}
    {%- if message.tool_calls -%}
        {{- "<|tool_call_start|>[" -}}
        {%- for call in message.tool_calls -%}
            {{- call.function.name + "(" -}}
            {%- for name, value in call.function.arguments.items() -%}
                {{- name + "=" + literal(value) + ("" if loop.last else ", ") -}}
            {%- endfor -%}
            {{- ")" + ("" if loop.last else ", ") -}}
        {%- endfor -%}
        {{- "]<|tool_call_end|>" -}}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
"""


def _template(turns: str, list_start: str = "", list_end: str = "") -> str:
    head = _HEAD.replace("LIST_START", list_start).replace("LIST_END", list_end)
    return head + turns + _TAIL


FALLBACK_TEMPLATES = {
    "lfm2": _template(_LFM2_TURNS, "<|tool_list_start|>", "<|tool_list_end|>"),
    "lfm2.5": _template(_LFM25_TURNS),
    "lfm2.5-2026": _template(_LFM25_2026_TURNS),
}


def fallback_for(name: str, *, has_think_token: bool) -> str:
    """Which fallback a checkpoint without a template gets.

    Args:
        name: The checkpoint's name: a hub id, or the last part of its path.
        has_think_token: Its tokenizer has ``<think>`` as one token, as the 128k vocabulary of 2026.

    Returns:
        A key of ``FALLBACK_TEMPLATES``: by the vocabulary first, then by the name, else ``lfm2``.
    """
    if has_think_token or re.search(r"lfm2\.5[-_](230m|2\.6b|8b|24b)", name, re.IGNORECASE):
        return "lfm2.5-2026"
    return "lfm2.5" if re.search(r"lfm2\.5", name, re.IGNORECASE) else "lfm2"
