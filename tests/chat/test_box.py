"""What a hostile template cannot do, and how its process lives and dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from chats import USER, text_of
from lfm2_gpu.chat import ChatTemplate, box
from lfm2_gpu.errors import InvalidRequest, ModelFileError
from lfm2_gpu.tokenizer import Tokenizer


def doubling(line: str, times: int) -> str:
    return "".join(line.replace("N", str(i + 1)).replace("M", str(i)) for i in range(times))


HOSTILE = {
    "nested loops": "{% for i in range(9 ** 5) %}"
    "{% for j in range(9 ** 5) %}{% endfor %}{% endfor %}",
    "endless text": "{% for i in range(9 ** 5) %}"
    "{% for j in range(9 ** 5) %}x{% endfor %}{% endfor %}",
    "huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "center filter": "{{ 'a' | center(3000000000) }}",
    "center method": "{{ 'a'.center(10 ** 9) }}",
    "string product": "{{ 'a' * 10 ** 10 }}",
    "list product": "{{ ([1] * 10 ** 9) | length }}",
    "format filter": "{{ '%03000000000d' | format(1) }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "power": "{{ (10 ** (10 ** 8)) % 7 }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "doubled text": "{% set s = 'x' %}" + "{% set s = s ~ s %}" * 50 + "{{ s | length }}",
    "doubled list": "{% set l0 = [1] %}" + doubling("{% set lN = [lM, lM] %}", 60) + "{{ l60 }}",
    "compared lists": "{% set a0 = [1] %}{% set b0 = [1] %}"
    + doubling("{% set aN = [aM, aM] %}{% set bN = [bM, bM] %}", 60)
    + "{{ a60 == b60 }}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(99) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ (('' | attr('__class__')).x) | attr('y').z }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "namespace": "{{ namespace.__init__.__globals__['os'].system('touch CANARY') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format by map": "{{ ['{0.__class__}'] | map('format', messages) | list }}"
    "{{ ''.format.__self__.__class__ }}",
    "include": "{% include 'CANARY' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "extends": "{% extends 'CANARY' %}",
    "append": "{% set x = messages.append(1) %}",
    "undefined": "{{ a.b.c }}",
    "no template": "{% if %}",
    "unknown tag": "{% debug %}",
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_templates_are_errors(
    kind: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what needs the whole time is stopped the same way by a shorter one
    monkeypatch.setattr(box, "CPU_SECONDS", 0.3)
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    template = ChatTemplate(
        HOSTILE[kind].replace("CANARY", str(canary)), tokenizer, origin="some.jinja"
    )
    started = time.monotonic()
    with pytest.raises(ModelFileError, match=r"some\.jinja: the chat template failed: ") as error:
        template.render([USER])
    # generous, since the machine may be busy: a template that is not stopped runs for hours
    assert time.monotonic() - started < 20
    assert len(str(error.value)) < 700
    assert list(tmp_path.iterdir()) == []
    template.close()


def test_the_time_limit_is_two_seconds(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(HOSTILE["nested loops"], tokenizer, origin="some.jinja")
    with pytest.raises(ModelFileError, match=r"some\.jinja: .* it ran for more than 2 s"):
        template.render([USER])
    template.close()


def test_a_template_may_refuse_the_messages(make: Callable[[str], ChatTemplate]) -> None:
    template = make("{{ raise_exception('roles must alternate') if messages | length > 1 }}ok")
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate") as error:
        template.render([USER, USER])
    assert error.value.param == "messages"
    assert text_of(template.render([USER])) == "ok"


def test_output_is_bounded_by_the_request(make: Callable[[str], ChatTemplate]) -> None:
    template = make("{% for i in range(40) %}{{ messages[0].content }}{% endfor %}")
    assert len(text_of(template.render([{"role": "user", "content": "x" * 20_000}]))) == 800_000
    with pytest.raises(ModelFileError, match="prints more than"):
        template.render([{"role": "user", "content": "x" * 200_000}])


def test_a_box_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = box.BoxedRenderer(
        "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}"
    )
    assert renderer.render({"n": 5}, 100) == "5"
    first = renderer._process
    assert renderer.render({"n": 6}, 100) == "6"
    assert renderer._process is first
    monkeypatch.setattr(box, "CPU_SECONDS", 0.2)
    with pytest.raises(box.TemplateFailure, match=r"more than 0\.2 s"):
        renderer.render({"n": 99_999}, 100)
    assert renderer.render({"n": 7}, 100) == "7"
    assert renderer._process is not first
    # killed from outside between two renders
    assert renderer._process is not None
    renderer._process.kill()
    with pytest.raises(box.TemplateFailure, match="ended its process"):
        renderer.render({"n": 8}, 100)
    assert renderer.render({"n": 9}, 100) == "9"
    second = renderer._process
    assert second is not None
    renderer.close()
    assert second.returncode is not None


def test_an_interrupted_answer_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = box.BoxedRenderer("{{ x }}")
    assert renderer.render({"x": "first"}, 100) == "first"
    with monkeypatch.context() as patch:
        patch.setattr(box, "_receive", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render({"x": "second"}, 100)
    assert renderer.render({"x": "third"}, 100) == "third"


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_box_can_open_and_write_nothing() -> None:
    renderer = box.BoxedRenderer("{{ x }}")
    renderer.render({"x": 1}, 10)
    assert renderer._process is not None
    limits = Path(f"/proc/{renderer._process.pid}/limits").read_text()
    renderer.close()
    for name, value in (
        ("Max open files", 3),
        ("Max file size", 0),
        ("Max core file size", 0),
        ("Max address space", 2**30),
    ):
        assert re.search(rf"^{name} +{value} +{value} ", limits, re.MULTILINE)


def test_a_box_carries_any_text(make: Callable[[str], ChatTemplate]) -> None:
    template = make("{{ messages[0].content }}")
    for text in ("é🌊\x00\r\n", "x" * 300_000, "日" * 100_000, "\U0001d000<\U0001d001>"):
        assert text_of(template.render([{"role": "user", "content": text}])) == text


def test_a_box_ends_with_its_owner_and_survives_a_fork() -> None:
    code = (
        "import os, sys\n"
        "from lfm2_gpu.chat.box import BoxedRenderer\n"
        "renderer = BoxedRenderer('{{ x }}')\n"
        "assert renderer.render({'x': 1}, 10) == '1'\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.exit(0 if renderer.render({'x': 2}, 10) == '2' else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert renderer.render({'x': 3}, 10) == '3'\n"
        "print(renderer._process.pid)\n"
    )
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    template = ChatTemplate("{{ x }}", tokenizer)
    with pytest.raises(ModelFileError, match="no process can be started to render it"):
        template.render([USER])
