"""Templates to render with: this package's own, and any other in its box."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lfm2_gpu.chat import FALLBACK_TEMPLATES, ChatTemplate
from lfm2_gpu.tokenizer import Tokenizer
from tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_tokenizer(directory)
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="session", params=sorted(FALLBACK_TEMPLATES))
def fallback(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(FALLBACK_TEMPLATES[request.param], tokenizer)


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Iterator[Callable[[str], ChatTemplate]]:
    """Builds templates from any source, which run in a box, and ends their processes."""
    made: dict[str, ChatTemplate] = {}

    def build(source: str) -> ChatTemplate:
        made.setdefault(source, ChatTemplate(source, tokenizer, origin="some.jinja"))
        return made[source]

    yield build
    for template in made.values():
        template.close()
