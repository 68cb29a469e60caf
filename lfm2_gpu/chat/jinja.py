"""One chat template compiled by jinja2, with what chat templates expect beside jinja's own.

`LocalRenderer` renders here and now, so it is for templates of this package only: the sandbox keeps
a template from code and files, not from using all time and memory. `lfm2_gpu.chat.box` adds those
limits for templates that come with a checkpoint.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_gpu.errors import InvalidRequest, ModelFileError

if TYPE_CHECKING:
    import jinja2

__all__ = ["LocalRenderer", "Renderer", "TemplateFailure"]


class TemplateFailure(Exception):
    """A template did not render. ``by_request``: it refused the messages by raise_exception."""

    def __init__(self, message: str, *, by_request: bool = False) -> None:
        super().__init__(message[:500])
        self.by_request = by_request

    def as_error(self, origin: str) -> InvalidRequest | ModelFileError:
        """The error that the caller of a render sees."""
        if self.by_request:
            return InvalidRequest(
                f"the chat template refuses the messages: {self}", param="messages"
            )
        return ModelFileError(f"{origin}: the chat template failed: {self}")


class Renderer(Protocol):
    """A template that can be rendered with any variables."""

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set."""

    def render(self, variables: Mapping[str, Any], max_chars: int) -> str:
        """The text; `TemplateFailure` if there is none or it is longer than ``max_chars``."""


class LocalRenderer:
    """Compiles at once, renders in the caller's thread."""

    def __init__(self, source: str) -> None:
        from jinja2 import meta

        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except Exception as error:
            raise _failure(error) from error
        self.variables = frozenset(meta.find_undeclared_variables(tree)) - {*environment.globals}

    def render(self, variables: Mapping[str, Any], max_chars: int) -> str:
        """The text; `TemplateFailure` if there is none or it is longer than ``max_chars``."""
        pieces = []
        room = max_chars
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateFailure(f"it prints more than {max_chars} characters")
        except TemplateFailure:
            raise
        # a template can raise anything that an expression can, and RecursionError and MemoryError
        except Exception as error:
            raise _failure(error) from error
        return "".join(pieces)


def _failure(error: Exception) -> TemplateFailure:
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if isinstance(line, int) else ""
    return TemplateFailure(f"{where}{type(error).__name__}: {error}")


def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it prints its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML, which models were not trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise TemplateFailure(str(message), by_request=True)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
