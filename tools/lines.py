"""Print lines of code per Python file, without blanks, comments and docstrings, and a total."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "lfm2_gpu", "benchmarks", "tools", "tests")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(source: str) -> int:
    """Lines of ``source`` that hold a token of code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print one line per file and one per folder."""
    for folder in FOLDERS:
        counts = {p: code_lines(p.read_text()) for p in sorted((ROOT / folder).rglob("*.py"))}
        for path, count in counts.items():
            print(f"{count:6}  {path.relative_to(ROOT)}")
        print(f"{sum(counts.values()):6}  {folder}/ in all, {len(counts)} files\n")


if __name__ == "__main__":
    main()
