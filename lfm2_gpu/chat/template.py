"""A checkpoint's chat template: which one, what it is given, and what of its text is trusted."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lfm2_gpu.chat.box import BoxedRenderer
from lfm2_gpu.chat.fallbacks import FALLBACK_TEMPLATES, fallback_for
from lfm2_gpu.chat.jinja import LocalRenderer, Renderer, TemplateFailure
from lfm2_gpu.chat.messages import call_text, check_messages, check_tools, plain
from lfm2_gpu.chat.provenance import StandIns, strings_in
from lfm2_gpu.errors import InvalidRequest, Lfm2Error, ModelFileError
from lfm2_gpu.files import open_regular, read_json

__all__ = ["ChatTemplate", "Vocabulary"]

_log = logging.getLogger(__name__)

_MAX_TEMPLATE_BYTES = 2**20
_MAX_CONFIG_BYTES = 2**24
# what a template may print beside the request, and how often it may repeat the request
_SPARE_CHARS = 2**20
_MAX_REPEATS = 16
# transformers' mark, which some templates look for
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_CALL_START, _CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
# the assistant's own text holds these as tokens, so in its history they are what they look like
_ASSISTANT_TOKENS = re.compile(
    "|".join(map(re.escape, (_CALL_START, _CALL_END, "<think>", "</think>")))
)
_PROBE_QUESTION = {"role": "user", "content": "q"}
_PROBE_ANSWERS = {
    "tool_calls": [
        {"type": "function", "id": "call_0", "function": {"name": "probe", "arguments": {"a": 1}}}
    ],
    "thinking": "probe",
}


class Vocabulary(Protocol):
    """What a template needs of a tokenizer; `lfm2_gpu.tokenizer.Tokenizer` is one."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts by role: ``bos_token``, ``eos_token``, ..."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts that must not come from a user."""

    def token_id(self, text: str) -> int | None:
        """Id of a token, if it is one."""


class ChatTemplate:
    """Renders chats. Safe from many threads.

    The template of a checkpoint runs in a box with limits (`lfm2_gpu.chat.box`), which is a process
    of its own; the fallback templates, which are this package's own text, run in this one.
    """

    def __init__(
        self,
        source: str,
        vocabulary: Vocabulary,
        *,
        tool_source: str | None = None,
        origin: str = "chat template",
    ) -> None:
        """Wrap a template; it is compiled at the first render.

        Args:
            source: The jinja2 text.
            vocabulary: Of the checkpoint's tokenizer.
            tool_source: Replaces ``source`` for chats with tools.
            origin: Where it was found, for errors.
        """
        self.source = source
        self.origin = origin
        self._vocabulary = vocabulary
        self._sources = (source, source if tool_source is None else tool_source)
        self._renderers: dict[str, Renderer] = {}
        self._prints: dict[tuple[str, str], bool] = {}

    @classmethod
    def from_dir(
        cls, directory: str | Path, vocabulary: Vocabulary, *, name: str | None = None
    ) -> ChatTemplate:
        """The template of a checkpoint, or the fallback of its generation.

        The file chat_template.jinja wins, then ``chat_template`` of tokenizer_config.json: a
        string, or a list of which ``default`` is taken and ``tool_use`` for chats with tools.

        Args:
            directory: The checkpoint.
            vocabulary: Of its tokenizer.
            name: The checkpoint's name, which chooses the fallback; default: the directory's.

        Raises:
            ModelFileError: A file is damaged.
        """
        directory = Path(directory)
        path = directory / "chat_template.jinja"
        if path.exists():
            return cls(_read_template(path), vocabulary, origin=str(path))
        path = directory / "tokenizer_config.json"
        if path.exists():
            config = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
            sources = _named_templates(config.get("chat_template"), str(path))
            if sources:
                tool_source = sources.get("tool_use")
                return cls(
                    sources["default"], vocabulary, tool_source=tool_source, origin=str(path)
                )
        has_think_token = vocabulary.token_id("<think>") is not None
        kind = fallback_for(name or directory.resolve().name, has_think_token=has_think_token)
        _log.warning("%s has no chat template: using the one of %s", directory, kind)
        return cls(FALLBACK_TEMPLATES[kind], vocabulary, origin=f"fallback template {kind}")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: object,
    ) -> list[tuple[str, bool]]:
        """The prompt as ``(text, trusted)`` segments for `Tokenizer.encode_segments`.

        A trusted segment has no control token but the template's own. Text from the request never
        makes one, whatever the template does with it, with one exception: the tool call and think
        tokens that an assistant's message spells, since they were its own.

        Args:
            messages: OpenAI's form; see `lfm2_gpu.chat.messages`.
            tools: JSON descriptions, or strings that are printed as they are.
            add_generation_prompt: End with the head of the assistant's turn.
            continue_final_message: End inside the last message, which is the assistant's.
            template_kwargs: Variables that the template reads, such as ``keep_past_thinking``.

        Raises:
            InvalidRequest: The messages are wrong or the template refuses them.
            ModelFileError: The template is wrong, or ran into the limits.
        """
        chat = check_messages(messages)
        described = check_tools(tools)
        source = self._sources[1 if described else 0]
        options = self._check_options(source, template_kwargs)
        if continue_final_message:
            _check_continuable(chat, add_generation_prompt)

        def text_of(chat: list[dict[str, Any]], tools: object, options: dict[str, Any]) -> str:
            variables = {**options, "tools": tools, "add_generation_prompt": add_generation_prompt}
            return self._text(source, chat, variables, continue_final_message)

        text = text_of(chat, described, options)
        stand_ins = StandIns.for_request(
            self._vocabulary.control_tokens, [chat, described, options], source
        )
        if stand_ins is None:
            return [(text, True)]
        shielded = text_of(
            [_hide_message(stand_ins, message) for message in chat],
            stand_ins.hide(described),
            stand_ins.hide(options),
        )
        if stand_ins.reveal(shielded) != text and self._controls(shielded) == self._controls(text):
            # the template looks at replaced characters, but what it prints without replacement has
            # just the control tokens that it prints with it
            return [(text, True)]
        # where the template looks and the control tokens differ, safety comes before its choice
        return stand_ins.segments(shielded)

    def close(self) -> None:
        """End the processes of the box; a later render starts them again."""
        for renderer in self._renderers.values():
            if isinstance(renderer, BoxedRenderer):
                renderer.close()

    def _text(
        self,
        source: str,
        chat: list[dict[str, Any]],
        variables: dict[str, Any],
        continue_final_message: bool,
    ) -> str:
        chat = [self._spell_out(source, message) for message in chat]
        if continue_final_message:
            chat[-1] = {**chat[-1], "content": chat[-1]["content"] + _CONTINUE_MARK}
        text = self._render(source, {**variables, "messages": chat})
        return _cut_at_mark(text) if continue_final_message else text

    def _render(self, source: str, variables: dict[str, Any]) -> str:
        room = _SPARE_CHARS + _MAX_REPEATS * sum(map(len, strings_in(variables)))
        variables = {**self._vocabulary.special_tokens, **variables}
        try:
            return self._renderer(source).render(variables, room)
        except TemplateFailure as failure:
            raise failure.as_error(self.origin) from failure

    def _renderer(self, source: str) -> Renderer:
        if source not in self._renderers:
            own = source in FALLBACK_TEMPLATES.values()
            # two threads may both make one: setdefault keeps the first and the other is collected
            self._renderers.setdefault(
                source, LocalRenderer(source) if own else BoxedRenderer(source)
            )
        return self._renderers[source]

    def _check_options(self, source: str, options: Mapping[str, object]) -> dict[str, Any]:
        if not options:
            return {}
        try:
            known = self._renderer(source).variables
        except TemplateFailure as failure:
            raise failure.as_error(self.origin) from failure
        ours = {"messages", "tools", "add_generation_prompt", *self._vocabulary.special_tokens}
        # a name with an underscore is the template's own, set on some of its branches only
        known = frozenset(name for name in known - ours if not name.startswith("_"))
        for name in options:
            if name not in known:
                raise InvalidRequest(
                    f"{name} is no option of the chat template, want one of {sorted(known)}",
                    param=name,
                )
        return {name: plain(value, name) for name, value in options.items()}

    def _controls(self, text: str) -> list[str]:
        pattern = "|".join(map(re.escape, self._vocabulary.control_tokens))
        return re.findall(pattern, text)

    def _spell_out(self, source: str, message: dict[str, Any]) -> dict[str, Any]:
        """Put into the content what the template would drop."""
        content = message["content"]
        if self._drops(source, message, "thinking", "</think>"):
            content = f"<think>{message['thinking']}</think>{content}"
        if self._drops(source, message, "tool_calls", _CALL_START):
            calls = f"{_CALL_START}{call_text(message['tool_calls'])}{_CALL_END}"
            # the models call first and talk afterwards, but think before either
            thought, mark, answer = content.rpartition("</think>")
            content = f"{thought}{mark}{calls}{answer}"
        return {**message, "content": content}

    def _drops(self, source: str, message: dict[str, Any], field: str, spelled: str) -> bool:
        """Whether a field of the message is neither printed nor spelled in its content already."""
        if field not in message or spelled in message["content"]:
            return False
        return not self._prints_field(source, field)

    def _prints_field(self, source: str, field: str) -> bool:
        """Whether the template prints an assistant's tool calls or thinking: it is tried out."""
        known = self._prints.get((source, field))
        if known is None:
            answer = {"role": "assistant", "content": "", field: _PROBE_ANSWERS[field]}
            variables = {"messages": [_PROBE_QUESTION, answer], "add_generation_prompt": False}
            try:
                known = "probe" in self._render(source, variables)
            except Lfm2Error:
                known = False
            self._prints[source, field] = known
        return known


def _read_template(path: Path) -> str:
    with open(open_regular(path), "rb") as file:
        raw = file.read(_MAX_TEMPLATE_BYTES + 1)
    if len(raw) > _MAX_TEMPLATE_BYTES:
        raise ModelFileError(f"{path}: is over {_MAX_TEMPLATE_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: is not UTF-8: {error}") from error


def _named_templates(value: object, origin: str) -> dict[str, str]:
    if isinstance(value, str):
        value = [{"name": "default", "template": value}]
    sources = {}
    for entry in value if isinstance(value, list) else []:
        name, source = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(source, str):
            raise ModelFileError(f"{origin}: chat_template has an entry without name or template")
        sources[name] = source
    if value is not None and "default" not in sources:
        raise ModelFileError(
            f"{origin}: chat_template is {type(value).__name__} with {sorted(sources)}, want a "
            "string or a list with 'default'"
        )
    return sources


def _check_continuable(chat: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    last = chat[-1]
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt are both true, want one of them",
            param="continue_final_message",
        )
    if last["role"] != "assistant" or "tool_calls" in last:
        raise InvalidRequest(
            "continue_final_message needs a last message of the assistant without tool calls, "
            f"it is of role {last['role']} with {sorted(last)}",
            param="continue_final_message",
        )


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not print the end of the last message",
            param="continue_final_message",
        )
    # a template that trims has taken the mark's space, and would have taken the message's own
    return text[:at] if text.startswith(_CONTINUE_MARK, at) else text[:at].rstrip()


def _hide_message(stand_ins: StandIns, message: dict[str, Any]) -> dict[str, Any]:
    hidden: dict[str, Any] = stand_ins.hide(message)
    if message["role"] == "assistant":
        for field in ("content", "thinking", "reasoning_content"):
            if field in message:
                hidden[field] = stand_ins.hide(message[field], _ASSISTANT_TOKENS)
    return hidden
