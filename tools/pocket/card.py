"""Write the model card and the loss curve: ``python -m tools.pocket.card``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .model import GENERATION
from .prepare import KINDS
from .template import ASSETS

MARGIN = 0.25
_HEAD = """# pocket

A language model of 7.81 M parameters in the shape of LFM2-MoE: hidden 256, 6 layers (conv, conv,
attention, conv, attention, conv), 4 heads and 2 KV heads of 64, two dense layers of 384, then 8
experts of 192 with top-2 routing, vocabulary 4,096. It ships with lfm2_gpu as the default of the
demo and of tests. It is a test article: it knows words, countries and tool calls a little, and is
often wrong. It is not a model of Liquid AI and holds none of their weights.

Trained from random weights with transformers' `Lfm2MoeForCausalLM` by `tools/pocket/` of the
repository; sources and licences are in `NOTICE`. Rows had up to 512 tokens; longer inputs are out
of its range.
"""

_EXPERTS = """Load on held-out prose, 1 is a fair share. Training balances the load over its mix of
prose, tool calls and chat, and experts divide these among themselves: on prose alone some are idle.
"""


def verdict(good: bool) -> str:
    """Return the word for a table cell."""
    return "pass" if good else "**fail**"


def bits_table(evaluation: dict[str, Any]) -> str:
    """Return the held-out bits per byte beside the baselines."""
    lines = [
        "| held-out text | bytes | pocket | unigram | Kneser-Ney 5-gram | gzip | xz |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for source, bits in evaluation["bits_per_byte"].items():
        base = evaluation["baselines"][source]
        others = (base[name] for name in ("unigram", "kneser_ney_5", "gzip", "xz"))
        cells = " | ".join(f"{x:.3f}" for x in others)
        lines.append(f"| {source} | {base['bytes']:,} | {bits:.3f} | {cells} |")
    return "\n".join(lines)


def goals_table(evaluation: dict[str, Any]) -> str:
    """Return every goal with what was measured."""
    text, shipped = evaluation["text"], evaluation["text_as_shipped"]
    gap = evaluation["baselines"]["all"]["kneser_ney_5"] - evaluation["bits_per_byte"]["all"]
    unseen = [v for k, v in evaluation["tools"].items() if k.endswith("unseen_values")]
    right = sum(cell["right_arguments"] for cell in unseen) / len(unseen)
    least = min(min(layer) for layer in evaluation["expert_loads"])
    rows = [
        ("bits per byte under the 5-gram", f">= {MARGIN}", f"{gap:.3f}", gap >= MARGIN),
        ("distinct 4-grams over all samples", ">= 80 %", f"{text['distinct_4_grams']:.1%}",
         text["distinct_4_grams"] >= 0.8),
        ("words in the training word list", ">= 97 %", f"{text['known_words']:.2%}",
         text["known_words"] >= 0.97),
        ("greedy loops of 50", "<= 10", str(text["greedy_loops"]), text["greedy_loops"] <= 10),
        ("right calls on unseen values", ">= 90 %", f"{right:.1%}", right >= 0.9),
        ("least loaded expert, share of fair", ">= 25 %", f"{least:.0%}", least >= 0.25),
    ]  # fmt: skip
    lines = ["| goal | wanted | measured | |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {want} | {got} | {verdict(ok)} |" for name, want, got, ok in rows]
    penalty = GENERATION["repetition_penalty"]
    lines.append(
        f"\nGreedy with repetition penalty {penalty}: {text['greedy_loops_with_penalty']} loops. "
        f"Distinct 4-grams within a sample: {text['distinct_4_grams_within']:.1%}. "
        f"Stopping at the end of text, as shipped: {shipped['mean_tokens']:.0f} tokens on average, "
        f"{shipped['greedy_loops']} greedy loops ({shipped['greedy_loops_with_penalty']} with the "
        f"penalty), {shipped['distinct_4_grams']:.1%} distinct 4-grams, "
        f"{shipped['known_words']:.1%} known words."
    )
    return "\n".join(lines)


def tools_table(evaluation: dict[str, Any]) -> str:
    """Return the tool calls at temperature 0, cell by cell."""
    lines = [
        "| question template | values | calls | parse | right tool | right arguments |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in evaluation["tools"].items():
        template, values = name.split("_template_")
        shares = " | ".join(f"{cell[k]:.0%}" for k in ("parsed", "right_tool", "right_arguments"))
        lines.append(
            f"| {template} | {values.removesuffix('_values')} | {cell['calls']} | {shares} |"
        )
    return "\n".join(lines)


def loads_table(evaluation: dict[str, Any]) -> str:
    """Return the load of every expert on held-out prose."""
    loads = evaluation["expert_loads"]
    experts = range(len(loads[0]))
    lines = [
        "| sparse layer | " + " | ".join(f"expert {i}" for i in experts) + " |",
        "| --- " * (len(experts) + 1) + "|",
    ]
    for layer, shares in enumerate(loads):
        lines.append(f"| {layer} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join(lines)


def sample_list(evaluation: dict[str, Any]) -> str:
    """Return the sample generations as a list."""
    return "\n".join(
        f"{i}. `{s['prompt'].strip()}`\n\n   > {' '.join(s['text'].split()) or '(nothing)'}\n"
        for i, s in enumerate(evaluation["samples"], 1)
    )


def plot(curve: list[dict[str, float]], path: Path) -> None:
    """Draw the training loss of each kind over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=90)
    millions = [point["tokens"] / 1e6 for point in curve]
    for kind in KINDS:
        axes.plot(millions, [point[kind] for point in curve], label=kind)
    axes.set(xlabel="million tokens", ylabel="training loss, nats per token", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    args = parser.parse_args()
    curve = json.loads((args.work / "curve.json").read_text("utf-8"))
    evaluation = json.loads((args.model / "evaluation.json").read_text("utf-8"))
    plot(curve, args.model / "loss_curve.png")
    last = curve[-1]
    shipped = ", ".join(f"{k} {v}" for k, v in GENERATION.items() if k != "do_sample")
    parts = [
        _HEAD,
        f"Training: {last['step']:,} steps, {last['tokens'] / 1e6:.1f} M tokens on one CPU core, "
        "batches of three kinds (see `tools/pocket/README.md`).\n",
        "![training loss](loss_curve.png)\n",
        "## Goals\n",
        f"Fifty prompts of held-out prose, 128 tokens each even where the text ended earlier, at "
        f"the shipped settings ({shipped}).\n",
        goals_table(evaluation),
        "\n## Held-out bits per byte\n",
        "xz after reading the training text: "
        f"{evaluation['baselines']['all']['xz_after_training_text']:.3f} over all.\n",
        bits_table(evaluation),
        "\n## Tool calls at temperature 0\n",
        "Right arguments: the call parses, names the right tool and equals the wanted call.\n",
        tools_table(evaluation),
        "\n## Experts\n",
        _EXPERTS,
        loads_table(evaluation),
        "\n## Ten samples, unpicked, at the shipped settings\n",
        sample_list(evaluation),
    ]
    (args.model / "README.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
