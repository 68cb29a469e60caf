"""Measure the pocket checkpoint: ``python -m tools.pocket.evaluate``.

Writes ``evaluation.json`` beside the checkpoint: bits per byte on held-out text and of the
baselines, variety and loops of generated text, accuracy of tool calls on what training never saw,
and the load of the experts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from . import tool_calls
from .backend import Backend, TransformersBackend
from .model import GENERATION, RouterBalance
from .template import ASSETS, render
from .tokenizer import BOS_ID, EOT_ID, strange_pieces
from .values import Values

WINDOW, CONTEXT = 255, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 16, 128
LOOP_WINDOW, LOOP_TIMES = 16, 3
CALLS_PER_CELL = 100
CALL_TOKENS = 80
LOAD_TOKENS = 20_000
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLE_QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is the capital of France?",
    "Where is Kenya?",
    "What is a violin?",
    "What does stubborn mean?",
)


def windows(ids: list[int]) -> list[tuple[list[int], int]]:
    """Cut a text into rows after the begin token, each with the count of tokens it scores.

    Every token is scored once; from the second row on, ``CONTEXT`` tokens come before.
    """
    rows = [([BOS_ID, *ids[:WINDOW]], len(ids[:WINDOW]))]
    done = WINDOW
    while done < len(ids):
        fresh = ids[done : done + WINDOW - CONTEXT]
        rows.append(([BOS_ID, *ids[done - CONTEXT : done], *fresh], len(fresh)))
        done += len(fresh)
    return rows


def unit_ids(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Return the tokens of units, each closed by the end-of-text token, as in training."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [token for e in encoded for token in (*e.ids, EOT_ID)]


def bits_per_byte(
    backend: Backend, tokenizer: Tokenizer, held: dict[str, list[str]]
) -> dict[str, float]:
    """Return the bits per byte of each held-out source and of all."""
    bits: dict[str, float] = {}
    size: dict[str, int] = {}
    for source, texts in held.items():
        rows = windows(unit_ids(tokenizer, texts))
        scored = backend.log_probs([row for row, _ in rows])
        nats = sum(sum(s[-count:]) for s, (_, count) in zip(scored, rows, strict=True))
        bits[source] = -nats / math.log(2)
        # the end-of-text token stands for the newline that closes a unit for the baselines
        size[source] = sum(len(text.encode()) + 1 for text in texts)
    result = {source: bits[source] / size[source] for source in held}
    return {**result, "all": sum(bits.values()) / sum(size.values())}


def prose_prompts(tokenizer: Tokenizer, held: dict[str, list[str]], seed: int) -> list[list[int]]:
    """Return the beginnings of held-out units, evenly from each source, cut before a word."""
    rng = random.Random(seed)
    pools = [rng.sample(texts, min(len(texts), PROMPTS)) for texts in held.values()]
    prompts: list[list[int]] = []
    for turn in range(PROMPTS):
        for pool in pools:
            if turn < len(pool) and len(prompts) < PROMPTS:
                encoded = tokenizer.encode(pool[turn], add_special_tokens=False)
                end = min(PROMPT_TOKENS, max(4, len(encoded.ids) // 2))
                while end > 1 and not encoded.tokens[end].startswith("\u0120"):
                    end -= 1
                prompts.append([BOS_ID, *encoded.ids[:end]])
    return prompts


def words_of(texts: list[str]) -> Counter[str]:
    """Count the words (runs of letters) of texts, in lower case."""
    return Counter(w for t in texts for w in re.findall(r"[^\W\d_]+", t.lower()))


def loops(ids: list[int]) -> bool:
    """Return whether some window of 16 tokens occurs three times."""
    count = len(ids) - LOOP_WINDOW + 1
    seen = Counter(tuple(ids[i : i + LOOP_WINDOW]) for i in range(count))
    return bool(seen) and max(seen.values()) >= LOOP_TIMES


def text_quality(
    backend: Backend,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    known: set[str],
    ignore_eos: bool,
) -> dict[str, Any]:
    """Return the variety of sampled text, the share of real words, and the greedy loops.

    Args:
        backend: the model.
        tokenizer: its tokenizer.
        prompts: begin token and the start of a text.
        known: the words that count as real.
        ignore_eos: write all 128 tokens, past the end of the text.
    """
    torch.manual_seed(0)
    sampled = backend.generate(prompts, NEW_TOKENS, GENERATION, ignore_eos)
    grams = [list(zip(*(ids[i:] for i in range(4)), strict=False)) for ids in sampled]
    pooled = [g for row in grams for g in row]
    words = Counter[str]()
    for ids in sampled:
        text = tokenizer.decode(ids, skip_special_tokens=False).replace("<|endoftext|>", "\n")
        # the token limit may cut the last word
        words += words_of([text if len(ids) < NEW_TOKENS else text.rpartition(" ")[0]])
    real = sum(n for w, n in words.items() if w in known)
    greedy = backend.generate(prompts, NEW_TOKENS, GREEDY, ignore_eos)
    penalty = {**GREEDY, "repetition_penalty": GENERATION["repetition_penalty"]}
    penalised = backend.generate(prompts, NEW_TOKENS, penalty, ignore_eos)
    return {
        "prompts": len(prompts),
        "mean_tokens": sum(map(len, sampled)) / len(sampled),
        "distinct_4_grams": len(set(pooled)) / len(pooled),
        "distinct_4_grams_within": sum(len(set(g)) / len(g) for g in grams if g) / len(grams),
        "known_words": real / words.total(),
        "unknown_examples": sorted(w for w in words if w not in known)[:20],
        "greedy_loops": sum(map(loops, greedy)),
        "greedy_loops_with_penalty": sum(map(loops, penalised)),
    }


def tool_accuracy(
    backend: Backend, tokenizer: Tokenizer, values: Values, seed: int
) -> dict[str, dict[str, float]]:
    """Return the shares of right calls, for (un)seen question templates and values apart."""
    rng = random.Random(seed)
    result = {}
    for held_template in (False, True):
        for held_values in (False, True):
            requests = [
                tool_calls.make_request(rng, values, held_template, held_values)
                for _ in range(CALLS_PER_CELL)
            ]
            prompts = [
                render(
                    [{"role": "user", "content": request.question}],
                    [tool_calls.schema(tool) for tool in request.offered],
                    add_generation_prompt=True,
                )
                for request in requests
            ]
            ids = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
            said = backend.generate(ids, CALL_TOKENS, GREEDY)
            verdicts = [
                tool_calls.check_call(tokenizer.decode(s, skip_special_tokens=False), request)
                for s, request in zip(said, requests, strict=True)
            ]
            cell = (
                f"{'unseen' if held_template else 'seen'}_template_"
                f"{'unseen' if held_values else 'seen'}_values"
            )
            result[cell] = {
                "calls": len(verdicts),
                "parsed": sum(v.parsed for v in verdicts) / len(verdicts),
                "right_tool": sum(v.right_tool for v in verdicts) / len(verdicts),
                "right_arguments": sum(v.right_arguments for v in verdicts) / len(verdicts),
            }
    return result


def samples(
    backend: Backend, tokenizer: Tokenizer, values: Values, prompts: list[list[int]]
) -> list[dict[str, str]]:
    """Return ten generations at the shipped settings, as they come: chat, tools, prose."""
    rng = random.Random(1)
    torch.manual_seed(1)
    texts = [
        render([{"role": "user", "content": q}], add_generation_prompt=True)
        for q in SAMPLE_QUESTIONS
    ]
    request = tool_calls.make_request(rng, values, held_values=True)
    offered = [tool_calls.schema(tool) for tool in request.offered]
    question = [{"role": "user", "content": request.question}]
    texts.append(render(question, offered, add_generation_prompt=True))
    ids = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts] + prompts[:3]
    said = [backend.generate([i], 96, GENERATION)[0] for i in ids]
    asked = [*SAMPLE_QUESTIONS, request.question, *(tokenizer.decode(p) for p in prompts[:3])]
    return [
        {"prompt": a, "text": tokenizer.decode(s, skip_special_tokens=False)}
        for a, s in zip(asked, said, strict=True)
    ]


def expert_loads(
    backend: TransformersBackend, tokenizer: Tokenizer, held: dict[str, list[str]]
) -> list[list[float]]:
    """Return each expert's load on held-out text as a share of its fair share, by MoE layer."""
    balance = RouterBalance(backend.model)
    for texts in held.values():
        rows = windows(unit_ids(tokenizer, texts)[:LOAD_TOKENS])
        backend.log_probs([row for row, _ in rows if len(row) == WINDOW + 1])
    shares = balance.loads / balance.loads.mean(dim=1, keepdim=True)
    return [[round(float(x), 3) for x in layer] for layer in shares]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    held = json.loads((args.work / "held_out.json").read_text("utf-8"))
    train = [text for _, text in json.loads((args.work / "train_text.json").read_text("utf-8"))]
    backend = TransformersBackend(args.model)
    values = Values(1234, sorted(words_of(held["wordnet"])), strange_pieces(tokenizer))
    result: dict[str, Any] = {"bits_per_byte": bits_per_byte(backend, tokenizer, held)}
    result["baselines"] = json.loads((args.work / "baselines.json").read_text("utf-8"))
    result["tools"] = tool_accuracy(backend, tokenizer, values, 99)
    prompts = prose_prompts(tokenizer, held, 7)
    known = set(words_of(train))
    result["text"] = text_quality(backend, tokenizer, prompts, known, ignore_eos=True)
    result["text_as_shipped"] = text_quality(backend, tokenizer, prompts, known, ignore_eos=False)
    result["samples"] = samples(backend, tokenizer, values, prompts)
    result["expert_loads"] = expert_loads(backend, tokenizer, held)
    out = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (args.model / "evaluation.json").write_text(out, "utf-8")
    print(out)


if __name__ == "__main__":
    main()
