"""Where tests import from, where ops run, and what uninitialised memory holds.

Without CUDA, kernels are decorated under ``TRITON_INTERPRET=1`` and can run in the checked
interpreter of ``interpreter.py``: tests in ``kernels/`` and those that ask for the ``interpreted``
fixture run them there, all others take the reference path. With CUDA the same bodies run on the
device.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# more threads only wait for each other at test sizes; read when torch loads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_TESTS = Path(__file__).resolve().parent
_ROOT = _TESTS.parent
_CUDA = torch.cuda.is_available()
_STARTED = time.time()

# the root on the path would make a namespace package of `kernels/`, which transformers probes for
sys.path[:] = [p for p in sys.path if Path(p or os.curdir).resolve() != _ROOT]
for package, folder in (("lfm2_gpu", _ROOT), ("lfm2_kernels", _ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(folder))
sys.path.append(str(_TESTS))
if not _CUDA:
    # before lfm2_kernels is imported: kernels are interpreted or compiled from their decoration on
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter  # noqa: E402

# now, so that every kernel is decorated while the interpreter is on
import lfm2_kernels  # noqa: E402, F401

if not _CUDA:
    interpreter.install()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if _CUDA else "cpu")


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Send this test's CPU ops through the Triton kernels instead of ``reference.py``."""
    with interpreter.enabled(not _CUDA):
        yield


@pytest.fixture(autouse=True)
def _isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    in_kernels = _TESTS / "kernels" in request.path.parents
    with interpreter.enabled(in_kernels and not _CUDA):
        # what a kernel leaves unwritten is then NaN, or the largest integer, in every test; the
        # public function also imports the compiler of torch, for a second
        torch._C._set_deterministic_algorithms(in_kernels, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = in_kernels
        yield
        torch._C._set_deterministic_algorithms(False, warn_only=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With CUDA, mark every test that uses ``device`` as gpu; without, skip what is marked so."""
    for item in items:
        if _CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if not _CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the sm_90 part of the table that ``kernels/test_compile.py`` wrote in this run."""
    if not hasattr(config, "cache"):
        return
    table = config.cache.mkdir("kernels") / "resources.txt"
    if table.exists() and table.stat().st_mtime >= _STARTED:
        terminalreporter.section(f"kernel resources on sm_90 (all: {table})")
        head, *rows = table.read_text().splitlines()
        hopper = [row for row in rows if " 90 bfloat16 " in row]
        terminalreporter.write_line("\n".join([head, *hopper]))
