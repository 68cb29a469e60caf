"""The command line as a user meets it, on a stub engine: arguments, streams, errors, exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import lfm2_gpu
from lfm2_gpu.api import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from lfm2_gpu.cli import main
from lfm2_gpu.errors import CapacityError, InvalidRequest, MissingExtra, ModelFileError
from lfm2_gpu.terminal import Conversation, footer, show
from support import child_environment


def outputs(*texts: str, error: str | None = None) -> Iterator[RequestOutput]:
    for i, text in enumerate(texts):
        finished = i == len(texts) - 1
        reason = FinishReason.STOP if finished else None
        choice = CompletionOutput(0, text, list(range(i + 1)), finish_reason=reason)
        yield RequestOutput("0", None, [5, 6, 7], [choice], finished, error=error)


class StubLLM:
    """Records how it was built and asked; answers with ``answer``."""

    answer: tuple[str, ...] = ("one", "one two", "one two three")
    error: Exception | None = None
    built: list[tuple[str, dict[str, Any]]]
    asked: list[tuple[Any, Any]]

    def __init__(self, model: str, **options: Any) -> None:
        type(self).built.append((model, options))

    def stream(self, prompt: Any, params: Any) -> Iterator[RequestOutput]:
        type(self).asked.append((prompt, params))
        if self.error is not None:
            raise self.error
        yield from outputs(*self.answer)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubLLM]:
    fresh = type("FreshStub", (StubLLM,), {"built": [], "asked": []})
    monkeypatch.setitem(vars(lfm2_gpu), "LLM", fresh)
    return fresh


@pytest.mark.parametrize(
    "words",
    [
        ["pocket", "a prompt"],
        ["--model", "pocket", "a prompt"],
        ["a prompt", "--model", "pocket"],
        ["pocket", "--max-num-seqs", "8", "a prompt"],
        ["--max-num-seqs", "8", "--", "pocket", "a prompt"],
    ],
)
def test_generate(
    stub: type[StubLLM], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["generate", *words]) == 0
    captured = capsys.readouterr()
    assert captured.out == "one two three\n"
    assert captured.err.startswith("[prompt 3 tokens | answer 3 tokens, ")
    assert stub.built == [("pocket", {"max_num_seqs": 8} if "8" in words else {})]
    [(prompt, params)] = stub.asked
    assert prompt == "a prompt"
    assert params == lfm2_gpu.SamplingParams(max_tokens=256)


def test_generate_passes_every_flag(stub: type[StubLLM]) -> None:
    engine = (
        "--device cpu --dtype float32 --max-model-len 32k --max-num-seqs 4 --seed 7 --revision v1 "
        "--max-num-batched-tokens 2K --num-gpu-blocks-override 9 --gpu-memory-utilization 0.5 "
        "-tp 1 --pipeline-parallel-size 1"
    )
    sampling = (
        "--temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --repetition-penalty 1.1 "
        "--presence-penalty 0.2 --frequency-penalty 0.3 --max-tokens 5 --min-tokens 2 "
        "--stop A --stop B --ignore-eos --no-skip-special-tokens"
    )
    words = ["--model", "m", *engine.split(), *sampling.split(), "a prompt"]
    assert main(["generate", *words]) == 0
    assert stub.built == [
        (
            "m",
            {
                "device": "cpu",
                "dtype": "float32",
                "revision": "v1",
                "max_model_len": 32000,
                "max_num_seqs": 4,
                "max_num_batched_tokens": 2048,
                "gpu_memory_utilization": 0.5,
                "num_gpu_blocks_override": 9,
                "seed": 7,
            },
        )
    ]
    assert stub.asked[0][1] == lfm2_gpu.SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        max_tokens=5,
        min_tokens=2,
        stop=("A", "B"),
        ignore_eos=True,
        skip_special_tokens=False,
    )


@pytest.mark.parametrize("words", [["pocket"], ["pocket", "-"], ["--model", "pocket"]])
def test_generate_reads_stdin(
    stub: type[StubLLM], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é first\n\n".encode())))
    assert main(["generate", *words]) == 0
    assert stub.asked[0][0] == "é first\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "no model: lfm2-gpu generate MODEL [PROMPT]"),
        (["generate", "m", "two", "prompts"], "2 prompts, want one: put it in quotes"),
        (["generate", "m", "p", "--temperature", "nan"], "temperature is nan, want a finite"),
        (["generate", "m", "p", "--max-tokens", "-3"], "max_tokens is -3, want an integer"),
        (["generate", "m", os.fsdecode(b"\xff")], "prompt is not UTF-8"),
        (["chat"], "no model: lfm2-gpu chat MODEL"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    stub: type[StubLLM], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lfm2-gpu: error: {message}")
    assert captured.err.count("\n") == 1
    assert not stub.built


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-tp 2", "-tp is 2, want 1: a model runs on one GPU"),
        ("--tensor-parallel-size=8", "--tensor-parallel-size is 8, want 1"),
        ("--trust-remote-code", "--trust-remote-code: code from a checkpoint is never run"),
        ("--enforce-eager", "unknown arguments: --enforce-eager"),
        ("--max-model 5", "unknown arguments: --max-model"),
        ("--max-model-len 1.5", "argument --max-model-len: '1.5', want a whole number"),
        ("--max-model-len 32g", "argument --max-model-len: '32g', want a whole number"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_flags_are_refused(
    stub: type[StubLLM], capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "m", "p", *flags.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not stub.built


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("prompt is empty"), 2),
        (ModelFileError("model.safetensors:\n  truncated"), 2),
        (MissingExtra("huggingface_hub", "hub"), 2),
        (CapacityError("no room"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_the_engine(
    stub: type[StubLLM], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    stub.error = error
    assert main(["generate", "m", "p"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code != 130:
        assert err == f"lfm2-gpu: error: {' '.join(str(error).split())}\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = (
        "import sys, lfm2_gpu\n"
        "from lfm2_gpu.api import CompletionOutput, RequestOutput\n"
        "class LLM:\n"
        "    def __init__(self, model): pass\n"
        "    def stream(self, prompt, params):\n"
        "        for i in range(20000):\n"
        "            text = 'word ' * (20 * i)\n"
        "            yield RequestOutput('0', None, [1], [CompletionOutput(0, text, [1])], False)\n"
        "vars(lfm2_gpu)['LLM'] = LLM\n"
        "from lfm2_gpu.cli import main\n"
        "sys.exit(main(['generate', 'm', 'p']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.read(4) == "word"
    child.stdout.close()
    assert child.wait(timeout=60) == 1
    assert child.stderr.read() == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "lfm2-gpu 0.1.0\n"


def test_collect_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["lfm2-gpu"] == lfm2_gpu.__version__
    assert facts["python"] == sys.version.split()[0]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_show_writes_only_what_is_new_and_keeps_the_terminal_safe() -> None:
    plain, tty = io.StringIO(), Tty()
    texts = ("a", "ab\x1b[2J", "ab\x1b[2J\tc\n\x9b!")
    last, interrupted = show(outputs(*texts), plain)
    assert plain.getvalue() == texts[-1] + "\n"
    assert last is not None
    assert last.finished
    assert not interrupted
    show(outputs(*texts), tty)
    assert tty.getvalue() == "ab\ufffd[2J\tc\n\ufffd!\n"


class Interrupted(io.StringIO):
    """Where Ctrl-C arrives while the second piece is written."""

    def write(self, text: str) -> int:
        if self.getvalue() and text != "\n":
            raise KeyboardInterrupt
        return super().write(text)


def test_show_closes_the_stream_on_ctrl_c() -> None:
    closed = []

    def stream() -> Iterator[RequestOutput]:
        try:
            yield from outputs("part", "part two", "never")
        finally:
            closed.append(True)

    out, running = Interrupted(), stream()
    last, interrupted = show(running, out)
    assert (out.getvalue(), interrupted, closed) == ("part\n", True, [True])
    assert last is not None
    assert last.outputs[0].text == "part two"


def test_footer_takes_the_engines_times() -> None:
    choice = CompletionOutput(0, "", list(range(11)), finish_reason=FinishReason.LENGTH)
    times = RequestMetrics(
        arrival_time=0.0, first_scheduled_time=1.0, first_token_time=3.0, finished_time=8.0
    )
    output = RequestOutput("0", None, [0] * 100, [choice], True, metrics=times)
    # 100 prompt tokens in 2 s, then 10 tokens after the first in 5 s
    expected = "[prompt 100 tokens, 50.0 tokens/s | answer 11 tokens, 2.0 tokens/s | length]"
    assert footer(output, 99.0) == expected


def talk(
    lines: list[str | type[BaseException]], answers: list[Any], system: str | None = None
) -> tuple[Conversation, list[Any], str, str]:
    asked: list[Any] = []
    out, err = io.StringIO(), io.StringIO()

    def stream(messages: list[dict[str, str]]) -> Iterator[RequestOutput]:
        asked.append(list(messages))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def read() -> str:
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    conversation = Conversation(stream, system=system, out=out, err=err)
    conversation.run(read)
    return conversation, asked, out.getvalue(), err.getvalue()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_chat_keeps_the_history() -> None:
    system = {"role": "system", "content": "be brief"}
    conversation, asked, out, err = talk(
        ["hi", "  ", "and?", "/reset", "again", "/exit", "never read"],
        [outputs("h", "hello"), outputs("more"), outputs("fresh")],
        system="be brief",
    )
    assert asked == [
        [system, user("hi")],
        [system, user("hi"), assistant("hello"), user("and?")],
        [system, user("again")],
    ]
    assert out == "hello\nmore\nfresh\n"
    assert "the conversation starts over" in err
    assert conversation.messages == [system, user("again"), assistant("fresh")]


def test_chat_goes_on_after_errors_and_ctrl_c() -> None:
    def interrupted() -> Iterator[RequestOutput]:
        yield next(outputs("half", "never"))
        raise KeyboardInterrupt

    conversation, asked, out, err = talk(
        [KeyboardInterrupt, "too long", "stop me", "broken", "/nonsense"],
        [InvalidRequest("prompt is 9 tokens"), interrupted(), outputs("x", error="NaN logits")],
    )
    assert len(asked) == 3
    assert "error: prompt is 9 tokens\n" in err
    assert "| stopped]\n" in err
    assert "error: NaN logits\n" in err
    assert err.count("/reset starts over") == 2
    assert out == "half\nx\n"
    # only the turn that was stopped by hand stays, with what it had said
    assert conversation.messages == [user("stop me"), assistant("half")]


def test_chat_command(stub: type[StubLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nthere\n"))
    assert main(["chat", "pocket", "--system-prompt", "S", "--temperature", "0"]) == 0
    assert [len(messages) for messages, _ in stub.asked] == [2, 4]
    assert stub.asked[0][1] == lfm2_gpu.SamplingParams(max_tokens=None, temperature=0)
