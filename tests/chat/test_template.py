"""What templates print, where they come from, and what may be passed to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chats import CALL, USER, WEATHER, text_of, trusted_controls
from lfm2_gpu.chat import FALLBACK_TEMPLATES, ChatTemplate
from lfm2_gpu.chat.fallbacks import fallback_for
from lfm2_gpu.errors import InvalidRequest, ModelFileError
from lfm2_gpu.tokenizer import Tokenizer

TOOLCALL = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "<think>hm</think>It is 3."},
    {"role": "user", "content": "Thanks"},
]
VECTORS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": (
        [
            {"role": "system", "content": "You are a helpful assistant trained by Liquid AI."},
            {"role": "user", "content": "What is C. elegans?"},
        ],
        None,
    ),
    "tools": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Zürich?"},
        ],
        [WEATHER],
    ),
    "toolcall": (TOOLCALL, [WEATHER]),
}


@pytest.mark.parametrize("chat", sorted(VECTORS))
@pytest.mark.parametrize(
    ("generation", "kind"),
    [("A_lfm2", "lfm2"), ("B_lfm25_instruct", "lfm2.5"), ("C_lfm25_2026", "lfm2.5-2026")],
)
def test_vectors_of_the_vendor_templates(generation: str, kind: str, chat: str) -> None:
    folder = os.environ.get("LFM2_TEST_DATA")
    if not folder:
        pytest.skip("LFM2_TEST_DATA is not set")
    vector = json.loads(Path(folder, "template_vectors.json").read_text())[f"{generation}/{chat}"]
    tokenizer = Tokenizer.from_file(Path(folder, "tokenizer_lfm2_65k.json"))
    messages, tools = VECTORS[chat]
    if kind != "lfm2.5-2026":
        # the vendor's older templates drop tool calls, which ChatTemplate would put into the text
        messages = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
    segments = ChatTemplate(FALLBACK_TEMPLATES[kind], tokenizer).render(messages, tools=tools)
    assert text_of(segments) == vector["text"]
    assert tokenizer.encode_segments(segments) == vector["ids_65k"]


def test_a_box_prints_the_same(make: Callable[[str], ChatTemplate], fallback: ChatTemplate) -> None:
    boxed = make(fallback.source + "{# another text, so no longer this package's own #}")
    for messages, tools in VECTORS.values():
        for generate in (False, True):
            expected = fallback.render(messages, tools=tools, add_generation_prompt=generate)
            got = boxed.render(messages, tools=tools, add_generation_prompt=generate)
            assert got == expected


def test_a_tool_may_be_a_string(fallback: ChatTemplate) -> None:
    assert "List of tools: " in text_of(fallback.render([USER], tools=["verbatim é", WEATHER]))
    text = text_of(fallback.render([USER], tools=["verbatim é", {"name": "é"}]))
    assert '[verbatim é, {"name": "é"}]' in text


def test_template_helpers(make: Callable[[str], ChatTemplate]) -> None:
    template = make(
        "  {% if true %}\n"
        "{{ messages | tojson }}|{{ {'b': 1, 'a': '<é'} | tojson(sort_keys=true) }}|"
        "{% generation %}{{ strftime_now('%Y') | length }}{% endgeneration %}|"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}|"
        "{{ eos_token }}{{ bos_token }}\n"
        "  {% endif %}\n"
    )
    text = text_of(template.render([{"role": "user", "content": "é\n"}]))
    assert text == (
        '[{"role": "user", "content": "é\\n"}]|{"a": "<é", "b": 1}|4|01|<|im_end|><|startoftext|>\n'
    )


def test_options_of_the_template(make: Callable[[str], ChatTemplate], tokenizer: Tokenizer) -> None:
    template = make(
        "{%- set loud = loud | default(false) -%}{{ 'HI' if loud else 'hi' }}{{ note }}"
        "{{ messages }}{{ bos_token }}{{ raise_exception }}"
    )
    assert text_of(template.render([USER], loud=True, note="<|im_end|>")).startswith("HI<|im_end|>")
    assert trusted_controls(template.render([USER], note="<|im_end|>")) == ["<|startoftext|>"]
    for name in ("colour", "messages", "bos_token", "raise_exception", "range", "self"):
        with pytest.raises((InvalidRequest, TypeError)) as error:
            template.render([USER], **{name: 1})
        if isinstance(error.value, InvalidRequest) and name != "messages":
            assert f"{name} is no option of the chat template, want one of ['loud', 'note']" in str(
                error.value
            )
    with pytest.raises(InvalidRequest, match="loud is object, want a JSON value"):
        template.render([USER], loud=object())


def test_continuing_the_last_message(
    fallback: ChatTemplate, make: Callable[[str], ChatTemplate]
) -> None:
    boxed = make(fallback.source + "{# boxed #}")
    answer = {"role": "assistant", "content": "It is <b> "}
    for template in (fallback, boxed):
        segments = template.render(
            [USER, answer], add_generation_prompt=False, continue_final_message=True
        )
        assert text_of(segments).endswith("<|im_start|>assistant\nIt is <b> ")
        with pytest.raises(InvalidRequest, match="both true"):
            template.render([USER, answer], continue_final_message=True)
        for last in (USER, {**answer, "tool_calls": [CALL]}):
            with pytest.raises(InvalidRequest, match="needs a last message of the assistant"):
                template.render(
                    [USER, last], add_generation_prompt=False, continue_final_message=True
                )


def test_continuing_with_templates_that_trim_or_drop(make: Callable[[str], ChatTemplate]) -> None:
    chat = [USER, {"role": "assistant", "content": "It is "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    trims = make("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert text_of(trims.render(chat, **options)) == "[Hi][It is"
    drops = make("{{ messages[0].content }}")
    with pytest.raises(InvalidRequest, match="does not print the end") as error:
        drops.render(chat, **options)
    assert error.value.param == "continue_final_message"


def test_where_templates_come_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = tmp_path / "tokenizer_config.json"

    def rendered(tools: Any = None) -> str:
        template = ChatTemplate.from_dir(tmp_path, tokenizer)
        text = text_of(template.render([USER], tools=tools))
        template.close()
        return text

    config.write_text(json.dumps({"chat_template": "one"}))
    assert rendered() == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (rendered(), rendered([WEATHER])) == ("two", "tools")
    (tmp_path / "chat_template.jinja").write_text("three")
    assert rendered() == "three"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is not UTF-8"):
        rendered()
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in (5, {"default": "x"}, [{"name": "other", "template": "x"}], [{"name": "default"}]):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(ModelFileError, match=r"tokenizer_config\.json: chat_template"):
            rendered()


def test_a_checkpoint_without_a_template_gets_one(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": null}')
    template = ChatTemplate.from_dir(tmp_path, tokenizer, name="LiquidAI/LFM2.5-1.2B-Instruct")
    assert template.source == FALLBACK_TEMPLATES["lfm2.5"]
    assert "no chat template: using the one of lfm2.5" in caplog.text


@pytest.mark.parametrize(
    ("name", "think", "kind"),
    [
        ("LFM2-8B-A1B", False, "lfm2"),
        ("my-finetune", False, "lfm2"),
        ("LiquidAI/LFM2-2.6B-Exp", False, "lfm2"),
        ("LFM2.5-1.2B-Instruct", False, "lfm2.5"),
        ("LFM2.5-350M", False, "lfm2.5"),
        ("lfm2.5-230m", False, "lfm2.5-2026"),
        ("LFM2.5-24B-A2B", True, "lfm2.5-2026"),
        ("my-finetune", True, "lfm2.5-2026"),
    ],
)
def test_which_fallback(name: str, think: bool, kind: str) -> None:
    assert fallback_for(name, has_think_token=think) == kind
