"""Import directions, modules without torch, and constructs that must not appear in the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT, python_lines

SOURCES = sorted([*(ROOT / "lfm2_gpu").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
KERNELS = [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")]

# unit <- units that it may import; a unit is lfm2_kernels or the first name below lfm2_gpu, and a
# dotted entry allows that module alone
BASE = {"errors"}
ALLOWED: dict[str, set[str]] = {
    "lfm2_kernels": set(),
    "errors": set(),
    "api": BASE,
    "files": BASE,
    "dialects": BASE,
    "config": BASE | {"api", "dialects", "files"},
    "model_table": {"config", "dialects"},
    "vendor": BASE | {"api", "config", "model_table"},
    "assets": BASE,
    "devices": BASE | {"lfm2_gpu"},
    "formats": BASE | {"config", "files", "lfm2_kernels.packing"},
    "model": BASE | {"lfm2_kernels", "config"},
    "loader": BASE | {"formats", "model", "config"},
    "describe": BASE | {"loader", "locate", "formats", "model.weights", "config"},
    "detokenizer": BASE,
    "tokenizer_file": BASE | {"files"},
    "tokenizer": BASE | {"api", "detokenizer", "tokenizer_file"},
    "chat": BASE | {"api", "files"},
    "engine": BASE | {"model", "lfm2_kernels", "config", "api"},
    "server": BASE | {"api", "tokenizer", "chat", "engine.client"},
    "interrupts": set(),
    "locate": BASE | {"assets", "formats.hub"},
    "output": {"api", "detokenizer", "tokenizer"},
    "jobs": {"api", "engine", "output", "tokenizer"},
    "llm": BASE
    | {"engine", "loader", "locate", "tokenizer", "chat", "api"}
    | {"devices", "files", "interrupts", "jobs", "output", "vendor"},
    "bench": BASE
    | {"llm", "engine", "server", "lfm2_kernels", "api", "config", "devices", "lfm2_gpu"},
    "plugs": BASE | {"llm", "engine", "server", "lfm2_kernels", "api"},
    "terminal": BASE | {"api"},
    # lazily, by name
    "lfm2_gpu": {"api", "llm"},
    "cli": {"lfm2_gpu", "api", "errors", "llm", "devices", "terminal", "describe"},
    "__main__": {"cli"},
}
# what of the standard library's outside a unit may import; missing here: anything
THIRD_PARTY: dict[str, set[str]] = {
    "lfm2_kernels": {"torch", "triton"},
    **{key: set() for key in ("errors", "api", "files", "terminal", "cli", "lfm2_gpu")},
}
# modules that load without torch; a star stands for every module of a folder
TORCHLESS = [
    "lfm2_gpu.api",
    "lfm2_gpu.errors",
    "lfm2_gpu.tokenizer",
    "lfm2_gpu.chat.*",
    "lfm2_gpu.config",
    "lfm2_gpu.output",
    "lfm2_gpu.vendor",
    "lfm2_gpu.describe",
    "lfm2_gpu.terminal",
    "lfm2_gpu.devices",
    "lfm2_gpu.assets",
    "lfm2_gpu.engine.request",
    "lfm2_gpu.engine.blocks",
    "lfm2_gpu.engine.scheduler",
    "lfm2_gpu.engine.table",
    "lfm2_gpu.engine.constraints",
    "lfm2_gpu.engine.client",
    "lfm2_gpu.server.*",
]
# promised by the table above, not written yet
LATER = {"lfm2_gpu.engine.client"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "yaml.load", "numpy.load", "np.load"}


def module_name(path: Path) -> str:
    root = ROOT / "kernels" if path in KERNELS else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Absolute name, line, and whether it was written relative, of every import in a file."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                # `from lfm2_gpu import api` is an import of lfm2_gpu.api
                yield ".".join([*stem, alias.name]), node.lineno, bool(node.level)


def unit(name: str) -> str:
    """``lfm2_gpu.engine.scheduler`` is in unit ``engine``; a name of the root package in it."""
    parts = name.split(".")
    if parts[0] != "lfm2_gpu" or len(parts) == 1:
        return parts[0]
    below = ROOT / "lfm2_gpu" / parts[1]
    return parts[1] if below.is_dir() or below.with_suffix(".py").exists() else "lfm2_gpu"


def bad_edges(path: Path) -> Iterator[str]:
    source = unit(module_name(path))
    if source not in ALLOWED:
        yield f"{path}: unit {source!r} is not in the table"
        return
    for name, line, relative in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top = name.split(".")[0]
        if top not in ("lfm2_gpu", "lfm2_kernels"):
            third_party = THIRD_PARTY.get(source)
            if third_party is not None and top not in {*sys.stdlib_module_names, *third_party}:
                yield where
            continue
        target = unit(name)
        inside = "lfm2_kernels" if source == "lfm2_kernels" else "lfm2_gpu"
        if relative != (top == inside == "lfm2_kernels"):
            yield f"{where}: relative inside lfm2_kernels, absolute everywhere else"
        allowed = ALLOWED[source]
        dotted = ".".join(name.removeprefix("lfm2_gpu.").split(".")[:2])
        if target != source and target not in allowed and dotted not in allowed:
            yield where


def test_imports_follow_the_arrows() -> None:
    assert [edge for path in SOURCES for edge in bad_edges(path)] == []


def test_a_wrong_arrow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOWED, "api", set())
    monkeypatch.setitem(THIRD_PARTY, "lfm2_kernels", {"triton"})
    found = [edge for path in SOURCES for edge in bad_edges(path)]
    assert any("lfm2_gpu/api.py" in edge and "lfm2_gpu.errors" in edge for edge in found)
    assert any("reference.py" in edge and "imports torch" in edge for edge in found)


def test_modules_that_load_without_torch() -> None:
    names = []
    for name in TORCHLESS:
        if name.endswith(".*"):
            folder = ROOT / name.removesuffix(".*").replace(".", "/")
            names += [module_name(path) for path in sorted(folder.rglob("*.py"))]
        elif name not in LATER:
            names.append(name)
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: print(name); break\n"
    )
    assert python_lines(code) == []


def test_kernels_is_a_folder_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"make_block_ptr|tl\.advance\b", "removed from the language in triton 3.9"),
        (r"\.atomic_(add|xchg|cas)\b", "the order of float sums would differ between runs"),
        (r"libdevice|inline_asm", "the interpreter has no equivalent, so no test would run it"),
        (r"@triton\.autotune", "timing inside a server, and sums that differ between runs"),
    ],
)
def test_kernels_avoid(pattern: str, why: str) -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in KERNELS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line.split("#")[0])
    ]
    assert lines == [], why


def test_nothing_executes_what_a_file_contains() -> None:
    found = []
    for path in SOURCES:
        where = path.relative_to(ROOT)
        found += [
            f"{where}:{n}" for m, n, _ in imports(path) if m.split(".")[0] in FORBIDDEN_MODULES
        ]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS:
                    found.append(f"{where}:{node.lineno} {name}")
                if any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                    found.append(f"{where}:{node.lineno} trust_remote_code")
    assert found == []
