"""The ``lfm2-gpu`` command: arguments to calls, errors to one line and an exit code.

Flags are spelled as vLLM spells them. Everything heavy is imported by the command that needs it, so
``--help`` loads no torch. Exit codes: 0, 1 (failed), 2 (bad input), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import lfm2_gpu
from lfm2_gpu.errors import InvalidRequest, Lfm2Error, MissingExtra, ModelFileError

if TYPE_CHECKING:
    from lfm2_gpu.api import SamplingParams
    from lfm2_gpu.llm import LLM

__all__ = ["main"]

_ENGINE_OPTIONS = (
    "device",
    "dtype",
    "revision",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "num_gpu_blocks_override",
    "seed",
)
_SAMPLING_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "min_tokens",
    "stop",
    "ignore_eos",
    "skip_special_tokens",
)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    # argparse takes all positionals at the first one; those after a later flag are left over
    options, rest = parser.parse_known_args(arguments)
    flags = [word for word in rest if word.startswith("-") and word != "-"]
    if flags or (rest and not hasattr(options, "words")):
        parser.error(f"unknown arguments: {' '.join(flags or rest)}")
    if rest:
        options.words += rest
    _set_up_streams()
    try:
        code: int = options.run(options)
    except Lfm2Error as error:
        from lfm2_gpu.terminal import one_line

        print(f"lfm2-gpu: error: {one_line(error)}", file=sys.stderr)
        bad_input = isinstance(error, (InvalidRequest, ModelFileError, MissingExtra))
        return 2 if bad_input else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader has gone; a second failure at exit would print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _set_up_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a character shows a replacement, never a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lfm2_gpu")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _generate(options: argparse.Namespace) -> int:
    if options.model is None:
        if not options.words:
            raise InvalidRequest("no model: lfm2-gpu generate MODEL [PROMPT]", param="model")
        options.model = options.words.pop(0)
    if len(options.words) > 1:
        raise InvalidRequest(
            f"{len(options.words)} prompts, want one: put it in quotes", param="prompt"
        )
    prompt = _prompt(options.words)
    params = _sampling_params(options)
    llm = _llm(options)
    from lfm2_gpu.terminal import footer, show

    started = time.monotonic()
    output, interrupted = show(llm.stream(prompt, params), sys.stdout)
    if output is not None:
        print(footer(output, time.monotonic() - started), file=sys.stderr)
        if output.error is not None:
            print(f"lfm2-gpu: error: {output.error}", file=sys.stderr)
            return 1
    return 130 if interrupted else 0


def _chat(options: argparse.Namespace) -> int:
    options.model = options.model or options.model_argument
    if options.model is None:
        raise InvalidRequest("no model: lfm2-gpu chat MODEL", param="model")
    params = _sampling_params(options)
    llm = _llm(options)
    from lfm2_gpu.terminal import Conversation

    conversation = Conversation(
        lambda messages: llm.stream(messages, params), system=options.system_prompt
    )
    conversation.run(_line_reader())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from lfm2_gpu.describe import describe

    print(describe(options.path))
    return 0


def _collect_env(options: argparse.Namespace) -> int:
    from lfm2_gpu.devices import environment

    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


def _llm(options: argparse.Namespace) -> LLM:
    given = {name: getattr(options, name) for name in _ENGINE_OPTIONS}
    return lfm2_gpu.LLM(options.model, **{k: v for k, v in given.items() if v is not None})


def _sampling_params(options: argparse.Namespace) -> SamplingParams:
    given = {name: getattr(options, name) for name in _SAMPLING_OPTIONS}
    kept = {k: v for k, v in given.items() if v is not None}
    # unlike the Python API, a terminal is not served by 16 tokens
    kept.setdefault("max_tokens", options.default_max_tokens)
    return lfm2_gpu.SamplingParams(**kept)


def _prompt(words: list[str]) -> str:
    if words and words[0] != "-":
        raw = os.fsencode(words[0])
    elif sys.stdin.isatty() and not words:
        raise InvalidRequest("no prompt: give one, or pipe one in", param="prompt")
    else:
        # one newline is the pipe's, the rest is the user's
        raw = sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompt is not UTF-8: {error}", param="prompt") from None


def _line_reader() -> Callable[[], str]:
    if not sys.stdin.isatty():

        def read_line() -> str:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line

        return read_line
    with contextlib.suppress(ImportError):
        # importing it gives input() line editing and history
        import readline  # noqa: F401
    return lambda: input("> ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm2-gpu",
        description="Run LFM2 and LFM2-MoE models.",
        epilog="MODEL is a folder, a hub id, or pocket, a small model that ships inside.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lfm2-gpu {lfm2_gpu.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", _generate, "continue a prompt")
    generate.add_argument("--model", help="the model; else the first word")
    generate.add_argument("words", nargs="*", metavar="[MODEL] [PROMPT]", help="- reads stdin")
    generate.set_defaults(default_max_tokens=256)
    chat = command("chat", _chat, "hold a conversation")
    chat.add_argument("--model")
    chat.add_argument("model_argument", nargs="?", metavar="MODEL")
    chat.add_argument("--system-prompt", metavar="TEXT", help="the system message")
    chat.set_defaults(default_max_tokens=None)
    for sub in (generate, chat):
        _add_engine_flags(sub.add_argument_group("engine"))
        _add_sampling_flags(sub.add_argument_group("sampling, else the model's own defaults"))
    inspect = command("inspect", _inspect, "describe a checkpoint without loading it")
    inspect.add_argument("path", metavar="PATH", help="a checkpoint's folder, or pocket")
    command("collect-env", _collect_env, "print versions, GPU, driver and device, for a report")
    return parser


def _add_engine_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"))
    group.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="auto: the checkpoint's"
    )
    group.add_argument(
        "--max-model-len", type=_count, metavar="N", help="prompt and answer together; 32k, 32K"
    )
    group.add_argument("--max-num-seqs", type=_count, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=_count, metavar="N")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="FRACTION")
    group.add_argument(
        "--num-gpu-blocks-override", type=_count, metavar="N", help="KV pages of 64 tokens"
    )
    group.add_argument("--seed", type=int, help="of the random draws")
    only = {"tensor-parallel-size": ("-tp",), "pipeline-parallel-size": ("-pp",)}
    for name, short in only.items():
        group.add_argument(
            f"--{name}", *short, action=_OnlyOne, metavar="1", help="1: models run on one GPU"
        )
    group.add_argument("--trust-remote-code", action=_NoRemoteCode, nargs=0, help="refused")


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--max-tokens", type=_count, metavar="N", help="generate: 256 by default")
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--skip-special-tokens", action=argparse.BooleanOptionalAction, default=None)


def _count(text: str) -> int:
    """``32768``, ``32k`` (32,000) or ``32K`` (32,768), as vLLM reads them."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmKM]?)", text)
    value = float(match[1]) * _UNITS[match[2]] if match else 0.5
    if value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r}, want a whole number, such as 32768, 32k or 32K"
        )
    return int(value)


class _OnlyOne(argparse.Action):
    """A vLLM flag that has a single possible value here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if values != "1":
            parser.error(f"{option_string} is {values}, want 1: a model runs on one GPU")


class _NoRemoteCode(argparse.Action):
    """A vLLM flag that is refused, with the reason."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(
            f"{option_string}: code from a checkpoint is never run here, and none is needed"
        )


if __name__ == "__main__":
    sys.exit(main())
