"""Every public name: listed, annotated, documented; every kernel wrapper twins its reference."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import lfm2_gpu
import lfm2_kernels
from lfm2_kernels import reference
from support import ROOT

# a wrapper may take these beside what its reference takes: memory to write to, a grid's bound
LAUNCH = {"out", "workspace", "max_seq_len"}
# used through the wrapper of another op, or by tests alone
NO_WRAPPER = {"exponential_race"}


def modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # running it is what importing __main__ means
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


MODULES = [*modules(lfm2_gpu), *modules(lfm2_kernels)]
PUBLIC = [
    (f"{module.__name__}.{name}", getattr(module, name))
    for module in MODULES
    for name in getattr(module, "__all__", [])
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
]
WRAPPERS = [
    (name, getattr(lfm2_kernels, name))
    for name in lfm2_kernels.__all__
    if inspect.isfunction(getattr(lfm2_kernels, name))
]


def test_every_name_in_all_exists() -> None:
    missing = [
        f"{module.__name__}.{name}"
        for module in MODULES
        for name in getattr(module, "__all__", [])
        if not hasattr(module, name)
    ]
    assert missing == []
    for module in MODULES:
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names)), module.__name__


def test_every_file_says_what_it_owns() -> None:
    folders = ("lfm2_gpu", "kernels", "tests", "benchmarks", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    silent = [
        str(p.relative_to(ROOT)) for p in files if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_names_are_annotated_and_documented(name: str, value: Any) -> None:
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    functions: list[Callable[..., Any]] = [value]
    if inspect.isclass(value):
        own = vars(value).items()
        functions = [f for n, f in own if inspect.isfunction(f) and not n.startswith("_")]
    for function in functions:
        assert (function.__doc__ or "").strip(), f"{function.__qualname__} has no docstring"
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            bare = parameter.annotation is inspect.Parameter.empty
            assert not bare or parameter.name == "self", (
                f"{function.__qualname__}: {parameter.name}"
            )
        assert signature.return_annotation is not inspect.Signature.empty, function.__qualname__


def test_every_reference_op_has_a_wrapper() -> None:
    ops = {
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert ops - NO_WRAPPER <= set(lfm2_kernels.__all__)


@pytest.mark.parametrize(("name", "wrapper"), WRAPPERS, ids=[name for name, _ in WRAPPERS])
def test_wrapper_takes_what_its_reference_takes(name: str, wrapper: Callable[..., Any]) -> None:
    twin = getattr(reference, name, None)
    if twin is None:
        pytest.skip("packs or plans on the host; has no twin")
    ours = dict(inspect.signature(wrapper).parameters)
    for extra in LAUNCH & set(ours):
        assert ours.pop(extra).kind is inspect.Parameter.KEYWORD_ONLY
    theirs = dict(inspect.signature(twin).parameters)
    shape = {n: (p.kind, p.default, p.annotation) for n, p in theirs.items()}
    assert {n: (p.kind, p.default, p.annotation) for n, p in ours.items()} == shape
    assert list(ours) == list(theirs)
    # shapes and errors are part of what a caller of a kernel must know
    doc = wrapper.__doc__ or ""
    assert "``[" in doc or "like ``" in doc.lower() or "contract of" in doc
