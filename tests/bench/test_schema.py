"""The benchmark document: what is written validates, what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2_gpu.bench.plots import plot_all
from lfm2_gpu.bench.schema import FIGURES, document, machine, validate
from lfm2_gpu.errors import MissingExtra


def result(op: str = "rmsnorm", tokens: int = 64, **changes: Any) -> dict[str, Any]:
    made = {
        "op": op,
        "model": "toy",
        "dtype": "bfloat16",
        "tokens": tokens,
        "bytes": 1000,
        "flops": 2000,
        "status": "ok",
        "detail": "memory-bound",
        "deviation": 0.001,
        **dict.fromkeys(FIGURES, 1.5),
    }
    return made | changes


def made(**changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "command": ["x"],
        "machine": {"device": "CPU"},
        "roof": {"copy_gb_s": 3000.0, "matmul_tflop_s": 800.0},
        "tests": None,
        "results": [result(), result("linear", 1)],
    }
    return document(**(parts | changes))


def test_document_survives_json() -> None:
    validate(json.loads(json.dumps(made())))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (result(status="fine"), r"results\[0\].* unknown .*median_us"),
        (result(median_us="3"), r"results\[0\]\.median_us is '3'"),
        ({**result(), "extra": 1}, r"unknown \['extra'\]"),
        ({k: v for k, v in result().items() if k != "op"}, r"missing \['op'\]"),
        (result(tokens=None), r"results\[0\]\.tokens is None"),
    ],
)
def test_results_that_do_not_fit(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(results=[bad])


def test_a_failed_result_has_no_figures() -> None:
    failed = {k: v for k, v in result(status="wrong", deviation=None).items() if k not in FIGURES}
    made(results=[failed])
    with pytest.raises(ValueError, match="want one of"):
        made(results=[failed | {"status": "fine"}])


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2, want lfm2-gpu/bench 1"):
        validate(made() | {"version": 2})


def test_machine(tmp_path: Path) -> None:
    facts = machine(tmp_path, commit="abc")
    assert facts["commit"] == "abc"
    # no git folder: unknown, not clean
    assert facts["dirty"] is None
    assert facts["cpus"] >= 1


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plot_all(made(), tmp_path)
    assert [path.name for path in drawn] == ["percent.png", "times.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plot_all(made(results=[]), tmp_path) == []
    plot_all(made(roof=None), tmp_path)


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lfm2-gpu\[bench\]'"):
        plot_all(made(), tmp_path)
