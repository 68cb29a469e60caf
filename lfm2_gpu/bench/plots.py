"""Pictures of a benchmark document: percent of the roof, the roofline, and times over floors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_gpu.errors import MissingExtra

__all__ = ["plot_all"]


def plot_all(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every picture that the document has figures for; returns the files written.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "bench") from error
    matplotlib.use("Agg")
    results = [r for r in document["results"] if r["status"] == "ok"]
    if not results:
        return []
    title = f"{document['machine']['device']}, {document['created'][:10]}"
    drawn = []
    for name, draw in (("percent", _percent), ("times", _times), ("roofline", _roofline)):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6), layout="constrained")
        draw(figure.subplots(), results, document["roof"])
        figure.suptitle(title)
        drawn.append(folder / f"{name}.png")
        figure.savefig(drawn[-1], dpi=110)
    return drawn


def _by_tokens(results: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["tokens"], []).append(result)
    return dict(sorted(groups.items()))


def _bars(axes: Any, results: list[dict[str, Any]], figure: str) -> None:
    ops = list(dict.fromkeys(result["op"] for result in results))
    groups = _by_tokens(results)
    height = 0.8 / len(groups)
    for i, (tokens, group) in enumerate(groups.items()):
        at = [ops.index(result["op"]) + i * height - 0.4 + height / 2 for result in group]
        values = [result[figure] for result in group]
        axes.barh(at, values, height, label=f"{tokens} tokens")
    axes.set_yticks(range(len(ops)), ops)
    axes.invert_yaxis()
    axes.legend()
    axes.grid(axis="x", alpha=0.3)


def _percent(axes: Any, results: list[dict[str, Any]], roof: Mapping[str, Any] | None) -> None:
    _bars(axes, results, "percent_of_roof")
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlabel("percent of the roof measured in the same run")


def _times(axes: Any, results: list[dict[str, Any]], roof: Mapping[str, Any] | None) -> None:
    _bars(axes, results, "median_us")
    axes.set_xscale("log")
    axes.set_xlabel("median time of a call with a cold L2, microseconds")


def _roofline(axes: Any, results: list[dict[str, Any]], roof: Mapping[str, Any] | None) -> None:
    for tokens, group in _by_tokens(results).items():
        counted = [result for result in group if result["flops"] > 0]
        intensity = [result["flops"] / result["bytes"] for result in counted]
        axes.scatter(intensity, [r["tflop_s"] for r in counted], label=f"{tokens} tokens", s=18)
        for x, result in zip(intensity, counted, strict=True):
            axes.annotate(result["op"], (x, result["tflop_s"]), fontsize=6)
    if roof is not None:
        ridge = roof["matmul_tflop_s"] * 1e3 / roof["copy_gb_s"]
        line = [0.01, ridge, max(ridge * 10, 1e4)]
        height = [min(x * roof["copy_gb_s"] / 1e3, roof["matmul_tflop_s"]) for x in line]
        axes.plot(line, height, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
    axes.grid(alpha=0.3)
