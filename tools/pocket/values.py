"""Random argument values, and which of them training never sees.

Strings come from Faker pools, WordNet words and, so that every token of the vocabulary is copied
somewhere, from strings of random tokens (kind ``strange``). Of the values that are longer than one
token, a fifth is held out for each tool, by hash.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from faker import Faker

from .sources import in_percent

HELD_OUT_VALUE_PERCENT = 20
STRANGE_SHARE = 0.2
POOL_SIZE = 6000

Value = str | int | float

_FIXED: dict[str, tuple[str, ...]] = {
    "sky": (
        "sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy", "stormy", "dry", "mild",
    ),
    "room": ("kitchen", "bedroom", "bathroom", "hall", "garden", "office", "garage", "living room"),
    "color": (
        "red", "green", "blue", "white", "yellow", "orange", "purple", "pink", "warm", "cold",
    ),
    "ok": ("done", "ok", "success"),
    "call_status": ("ringing", "connected", "busy"),
    "parcel_status": ("waiting", "on its way", "delivered", "delayed"),
    "currency": (
        "dollars", "euros", "pounds", "yen", "francs", "kroner", "pesos", "rupees", "lira", "zloty",
    ),
    "language": (
        "French", "German", "Spanish", "Italian", "Dutch", "Greek", "Latin", "Polish", "Danish",
        "Turkish", "Arabic", "Hindi", "Korean", "Japanese", "Swedish", "Finnish", "Welsh", "Thai",
    ),
}  # fmt: skip
_NUMBERS: dict[str, tuple[int, int]] = {
    "small_int": (2, 14),
    "percent": (0, 100),
    "celsius": (-20, 40),
}


class Values:
    """A seeded source of values by kind."""

    def __init__(self, seed: int, words: list[str], strange_pieces: list[str]) -> None:
        """Fill the pools.

        Args:
            seed: of the random numbers, Faker's included.
            words: lemmas for things, titles and phrases.
            strange_pieces: the text of vocabulary tokens, as ``tokenizer.strange_pieces`` lists it.
        """
        self._rng = random.Random(seed)
        self._words = words
        self._pieces = strange_pieces
        self._next_piece = 0
        fake = Faker("en_US")
        fake.seed_instance(seed)
        makers: dict[str, Callable[[], str]] = {
            "city": fake.city,
            "person": fake.name,
            "company": fake.company,
            "street": fake.street_address,
            "email": fake.email,
            "phone": lambda: fake.numerify("###-###-####"),
        }
        self._pools = {k: [_plain(make()) for _ in range(POOL_SIZE)] for k, make in makers.items()}

    def draw(self, tool: str, kind: str, held_out: bool | None) -> Value:
        """Draw a value of a kind for a tool.

        Args:
            tool: whose held-out set applies.
            kind: a value kind of ``tool_table.py``.
            held_out: False for values allowed in training, True for held-out ones, None for either.
                Kinds too small to hold anything out ignore True.
        """
        while True:
            value = self._make(kind)
            if held_out is None or kind in _FIXED or kind in _NUMBERS:
                return value
            if is_held_out(tool, value) == held_out:
                return value

    def _make(self, kind: str) -> Value:
        rng = self._rng
        if kind in _FIXED:
            return rng.choice(_FIXED[kind])
        if kind in _NUMBERS:
            return rng.randint(*_NUMBERS[kind])
        if kind == "int":
            return rng.randint(0, 10 ** rng.randint(1, 6))
        if kind == "amount":
            whole = rng.randint(1, 10 ** rng.randint(1, 5))
            return whole if rng.random() < 0.5 else round(whole + rng.random(), 2)
        if kind == "strange" or (kind not in _STRICT and rng.random() < STRANGE_SHARE):
            return self.strange()
        if kind in self._pools:
            return rng.choice(self._pools[kind])
        return self._composed(kind)

    def _composed(self, kind: str) -> str:
        rng = self._rng
        match kind:
            case "thing":
                return rng.choice(self._words)
            case "title":
                count = rng.randint(1, 3)
                text = " ".join(rng.choice(self._words) for _ in range(count))
                return text.title() if rng.random() < 0.5 else text
            case "phrase":
                return " ".join(rng.choice(self._words) for _ in range(rng.randint(2, 4)))
            case "time":
                hour, minute = rng.randint(0, 23), rng.randint(0, 59)
                return f"{hour}:{minute:02d}" if rng.random() < 0.7 else f"{hour % 12 + 1} pm"
            case "date":
                return _date(rng)
            case "ticker":
                return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3))
            case "code":
                letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(2))
                return f"{letters}{rng.randint(1000, 999999)}"
            case "path":
                word = rng.choice(self._words).replace(" ", "_")
                folder = rng.choice(("", "", "/home/", "docs/", "src/", "data/"))
                return f"{folder}{word}.{rng.choice(('txt', 'md', 'py', 'csv', 'json'))}"
        raise ValueError(f"values: unknown kind {kind!r}")

    def strange(self) -> str:
        """Return a string of two to four tokens, walking the whole vocabulary in turn."""
        picked = []
        for _ in range(self._rng.randint(2, 4)):
            if self._next_piece == 0:
                self._rng.shuffle(self._pieces)
            picked.append(self._pieces[self._next_piece])
            self._next_piece = (self._next_piece + 1) % len(self._pieces)
        return "".join(picked).strip() or "x"


_STRICT = frozenset({"time", "date", "ticker", "phone", "email"})
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(0, 11), rng.randint(1990, 2039)
    match rng.randint(0, 2):
        case 0:
            return f"{day} {_MONTHS[month]} {year}"
        case 1:
            return f"{_MONTHS[month]} {day}"
        case _:
            return f"{year}-{month + 1:02d}-{day:02d}"


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace('"', "").replace("\\", "")


def is_held_out(tool: str, value: Value) -> bool:
    """Return whether a value is kept from a tool's training questions."""
    return in_percent(f"value/{tool}/{value}", HELD_OUT_VALUE_PERCENT)
