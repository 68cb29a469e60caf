"""Text in a terminal: stream one answer, hold a conversation. Knows outputs, not engines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

from lfm2_gpu.api import RequestOutput
from lfm2_gpu.errors import Lfm2Error

__all__ = ["Conversation", "footer", "one_line", "show"]

_HELP = "/reset starts over, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer"
# a model's text must not steer the terminal: control characters other than newline and tab
_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}

Message = dict[str, str]


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def show(outputs: Iterable[RequestOutput], out: TextIO) -> tuple[RequestOutput | None, bool]:
    """Write the growing text of choice 0 to ``out`` as it comes.

    Returns:
        The last output, ``None`` if there was none, and whether Ctrl-C ended it.
    """
    last, written, interrupted = None, 0, False
    clean = out.isatty()
    stream = iter(outputs)
    try:
        for last in stream:
            fresh = last.outputs[0].text[written:]
            written += len(fresh)
            out.write(fresh.translate(_CONTROLS) if clean else fresh)
            out.flush()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # ends the request now, not when the garbage collector finds it
        if hasattr(stream, "close"):
            stream.close()
    out.write("\n")
    out.flush()
    return last, interrupted


def footer(output: RequestOutput, seconds: float) -> str:
    """Tokens and tokens/s, prompt and answer apart where the engine measured them.

    ``seconds`` is the whole time, for an engine that measured nothing or did not finish.
    """
    prompt, answer = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    times = output.metrics
    if times and times.first_token_time and times.finished_time and answer > 1:
        before = times.first_token_time - (times.first_scheduled_time or times.arrival_time)
        after = times.finished_time - times.first_token_time
        speeds = _rate(prompt, before), _rate(answer - 1, after)
    else:
        speeds = "", _rate(answer, seconds)
    reason = output.outputs[0].finish_reason or "stopped"
    return f"[prompt {prompt} tokens{speeds[0]} | answer {answer} tokens{speeds[1]} | {reason}]"


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""


class Conversation:
    """A conversation by turns, and the loop that reads them.

    Args:
        stream: Messages to cumulative outputs; raises ``Lfm2Error`` for a turn that cannot be.
        system: First message, if any.
        out: Where answers go. err: where everything else goes.
    """

    def __init__(
        self,
        stream: Callable[[list[Message]], Iterator[RequestOutput]],
        *,
        system: str | None = None,
        out: TextIO = sys.stdout,
        err: TextIO = sys.stderr,
    ) -> None:
        self._stream, self._out, self._err = stream, out, err
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)

    def reset(self) -> None:
        """Forget every turn, keep the system message."""
        self.messages = list(self._system)

    def turn(self, text: str) -> None:
        """One question and its answer. A turn that fails leaves no trace in the history."""
        question = {"role": "user", "content": text}
        started = time.monotonic()
        try:
            output, _ = show(self._stream([*self.messages, question]), self._out)
        except Lfm2Error as error:
            self._say(f"error: {one_line(error)}")
            return
        if output is None:
            return
        if output.error is not None:
            self._say(f"error: {output.error}")
            return
        answer = {"role": "assistant", "content": output.outputs[0].text}
        self.messages += [question, answer]
        self._say(footer(output, time.monotonic() - started))

    def run(self, read: Callable[[], str]) -> None:
        """Read turns with ``read`` until it raises ``EOFError`` or the user leaves."""
        self._say(_HELP)
        while True:
            try:
                text = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("")
                continue
            if text == "/exit":
                return
            if text == "/reset":
                self.reset()
                self._say("the conversation starts over")
            elif text.startswith("/"):
                self._say(_HELP)
            elif text:
                self.turn(text)

    def _say(self, line: str) -> None:
        self._err.write(line + "\n")
        self._err.flush()
