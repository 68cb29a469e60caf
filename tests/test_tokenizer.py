"""The tokenizer against the `tokenizers` library, on a tiny vocabulary and on the real 65k one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_gpu.errors import InvalidRequest
from lfm2_gpu.tokenizer import Tokenizer
from tiny_tokenizer import SPECIAL_TOKENS, rewrite, save_tiny_tokenizer

quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)

# words, scripts, code, runs of spaces and newlines, and pieces that could grow into control tokens
PIECES = [
    *(" river", "A", "'ll", "123456", "日本語", "🌊", "e\u0301", "def f(x):\n    return", "\t"),
    *("\n", "\n\n\n", "  ", "\r\n", "<", ">", "|", "<|", "|>", "im_end", "<|im_", "end|>", "\x00"),
    *("python", " Mathias", "<think>", "\ufffd", "▁", "Ġ", "<0x0A>"),
]
CHAT = "<|im_start|>user\nWhat is C. elegans?<|im_end|>\n<|im_start|>assistant\n"


def data_file(name: str) -> Path:
    folder = os.environ.get("LFM2_TEST_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip("the folder that LFM2_TEST_DATA names has no " + name)
    return Path(folder) / name


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=["tiny", "65k"])
def path(request: pytest.FixtureRequest, tiny_dir: Path) -> Path:
    if request.param == "65k":
        return data_file("tokenizer_lfm2_65k.json")
    return tiny_dir / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def reference(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if tokenizer.is_special(i)]


# ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [1, 36309, 2031]),
        (" leading", [1, 5845]),
        ("日本語のテスト", [1, 62506, 1084, 4374, 7133]),
        (
            "def f(x):\n    return x**2",
            [1, 3663, 792, 6780, 5174, 861, 1789, 3053, 1463, 527],
        ),
        (
            CHAT,
            [1, 6, 6423, 708, 3493, 856, 841, 523, 14230, 998, 540, 7, 708, 6, 64015, 708],
        ),
        ("", [1]),
    ],
)
def test_vectors_of_the_65k_vocabulary(text: str, ids: list[int]) -> None:
    tokenizer = Tokenizer.from_file(data_file("tokenizer_lfm2_65k.json"))
    assert tokenizer.encode(text, add_special_tokens=True, allow_special=True) == ids
    assert tokenizer.encode(text, add_special_tokens=False, allow_special=True) == ids[1:]


def test_facts_of_the_65k_vocabulary() -> None:
    tokenizer = Tokenizer.from_file(data_file("tokenizer_lfm2_65k.json"))
    ids = tokenizer.ids
    assert tokenizer.vocab_size == 64_400
    assert tokenizer.holes == frozenset()
    assert len(tokenizer.control_tokens) == 505
    assert (ids.pad, ids.bos, ids.endoftext, ids.im_start, ids.im_end, ids.eos) == (
        0,
        1,
        2,
        6,
        7,
        7,
    )
    assert (ids.tool_list_start, ids.tool_list_end) == (8, 9)
    assert (ids.tool_call_start, ids.tool_call_end) == (10, 11)
    assert (ids.tool_response_start, ids.tool_response_end) == (12, 13)
    assert (ids.think_start, ids.think_end) == (None, None)
    # two words are added tokens, yet no control tokens, so users may write them
    plain = tokenizer.encode("python Mathias", add_special_tokens=False)
    assert plain == [64014, 730, 64011]
    assert not controls(tokenizer, plain)
    assert [tokenizer.token_text(i) for i in (501, 509)] == ["\n" * 10, "\n" * 2]


def test_roles_of_the_tiny_vocabulary(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_dir)
    assert [tokenizer.token_id(text) for text in SPECIAL_TOKENS] == list(range(14))
    assert (tokenizer.ids.bos, tokenizer.ids.eos, tokenizer.ids.pad) == (1, 7, 0)
    assert tokenizer.special_tokens == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
    }
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.control_tokens == frozenset(SPECIAL_TOKENS)


def test_roles_come_from_the_config(tmp_path: Path, tiny_dir: Path) -> None:
    rewrite(tmp_path, lambda data: None, tiny_dir)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "x", "unk_token": "<unk>"}')
    config = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.ids.bos, tokenizer.ids.eos, tokenizer.ids.pad) == (1, 2, 0)
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert tokenizer.special_tokens["unk_token"] == "<unk>"


# text to ids

texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@quick
@given(text=texts)
def test_ordinary_text_is_encoded_as_the_library_does(
    text: str, tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    if any(token in text for token in tokenizer.control_tokens):
        return
    assert tokenizer.encode(text, add_special_tokens=True) == reference.encode(text).ids
    for trusted in (False, True):
        ids = tokenizer.encode(text, add_special_tokens=False, allow_special=trusted)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


hostile = st.lists(st.sampled_from([*SPECIAL_TOKENS, *PIECES]), max_size=10)


@quick
@given(pieces=hostile)
def test_trusted_text_is_encoded_as_the_library_does(
    pieces: list[str], tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=True)
    assert ids == reference.encode(text, add_special_tokens=False).ids


@quick
@given(pieces=hostile)
def test_untrusted_text_never_becomes_a_control_token(
    pieces: list[str], tokenizer: Tokenizer
) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert controls(tokenizer, ids) == []
    # it is all there, as text
    assert tokenizer.decode(ids) == text


def test_every_control_token_stays_text_when_untrusted(tokenizer: Tokenizer) -> None:
    for text in tokenizer.control_tokens:
        for spelled in (text, f" {text}", f"a{text}b", text * 2, f"<{text}>"):
            ids = tokenizer.encode(spelled, add_special_tokens=False)
            assert controls(tokenizer, ids) == []
            assert tokenizer.decode(ids) == spelled
        trusted = tokenizer.encode(f"a{text}b", add_special_tokens=False, allow_special=True)
        assert controls(tokenizer, trusted) == [tokenizer.token_id(text)]


@quick
@given(pieces=hostile, data=st.data())
def test_where_segments_are_cut_does_not_matter(
    pieces: list[str], data: st.DataObject, tokenizer: Tokenizer
) -> None:
    text = "".join(pieces)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    ends = sorted({0, len(text), *places})
    cut = [(text[a:b], False) for a, b in itertools.pairwise(ends)]
    assert tokenizer.encode_segments(cut) == tokenizer.encode(text, add_special_tokens=False)


def test_only_whole_trusted_spellings_count(tokenizer: Tokenizer) -> None:
    end = tokenizer.ids.im_end
    for segments in (
        [("<|im_", True), ("end|>", False)],
        [("<|im_", False), ("end|>", True)],
        [("<", True), ("|im_end|", False), (">", True)],
        [("<|im_", True), ("end|>", True)],
    ):
        ids = tokenizer.encode_segments(segments)
        assert controls(tokenizer, ids) == []
        assert ids == tokenizer.encode("<|im_end|>", add_special_tokens=False)
    mixed = [("<|im_end|>", False), ("<|im_end|>\n", True), ("\n\nHi", False)]
    ids = tokenizer.encode_segments(mixed)
    assert controls(tokenizer, ids) == [end]
    # text on both sides of a border is split into tokens as one text
    assert ids[ids.index(end) + 1 :] == tokenizer.encode("\n\n\nHi", add_special_tokens=False)


@pytest.mark.parametrize("start", ["<|startoftext|>", "<|startoftext|><|startoftext|>", "", "Hi"])
@pytest.mark.parametrize("trusted", [False, True])
def test_the_start_token_is_never_doubled(tokenizer: Tokenizer, start: str, trusted: bool) -> None:
    ids = tokenizer.encode(start + " there", add_special_tokens=True, allow_special=trusted)
    written = start.count("<|startoftext|>") if trusted else 0
    assert ids[0] == tokenizer.ids.bos
    assert ids.count(1) == max(1, written)


def test_text_that_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"surrogate pair, '.ud800', at character 2"):
        tokenizer.encode("ab\ud800", add_special_tokens=False)
    with pytest.raises(InvalidRequest, match="text is int, want a string"):
        tokenizer.encode(5, add_special_tokens=False)  # type: ignore[arg-type]


# ids to text


@quick
@given(data=st.data())
def test_ids_are_decoded_as_the_library_does(
    data: st.DataObject, tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    some = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 20)
    ids = data.draw(st.lists(some, max_size=12))
    for skip in (False, True):
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert text == reference.decode(ids, skip_special_tokens=skip)
        stream = tokenizer.detokenizer(skip_special_tokens=skip)
        deltas = [stream.push([i]) for i in ids]
        assert "".join(deltas) + stream.flush() == text


def test_a_prompt_cut_inside_a_character_does_not_leak(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("秘密 🌊🚣 secret", add_special_tokens=True)
    for cut in range(1, len(ids)):
        stream = tokenizer.detokenizer()
        streamed = "".join(stream.push([i]) for i in ids[cut:]) + stream.flush()
        generated = b"".join(map(tokenizer.token_bytes, ids[cut:]))
        assert streamed == generated.decode("utf-8", "replace")


def test_token_texts(tokenizer: Tokenizer) -> None:
    river = tokenizer.encode(" river 🌊", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, river)) == " river 🌊".encode()
    assert tokenizer.token_text(7) == "<|im_end|>"
    assert "\ufffd" in "".join(map(tokenizer.token_text, river))
    texts = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
    assert "".join(texts[:8]).startswith("<|pad|><|startoftext|>")


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**63])
def test_ids_that_are_no_tokens(tokenizer: Tokenizer, wrong: int) -> None:
    for call in (tokenizer.token_text, tokenizer.token_bytes, lambda i: tokenizer.decode([i])):
        with pytest.raises(InvalidRequest, match=f"token id {wrong} stands for no token") as error:
            call(wrong)
        assert error.value.param == "token_ids"


def test_a_token_that_is_not_spelled_in_bytes_means_itself(tmp_path: Path, tiny_dir: Path) -> None:
    rewrite(tmp_path, lambda data: data["model"]["vocab"].update({"é x": 512, "éx": 513}), tiny_dir)
    tokenizer = Tokenizer.from_dir(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # a space is no letter of the alphabet of bytes; é is one, and stands for byte 0xe9
    assert tokenizer.decode([512]) == reference.decode([512]) == "é x"
    assert tokenizer.token_bytes(513) == b"\xe9x"
    assert tokenizer.decode([513]) == reference.decode([513]) == "\ufffdx"


def test_holes_are_known(tmp_path: Path, tiny_dir: Path) -> None:
    def move_last(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab[max(vocab, key=vocab.__getitem__)] = 514

    tokenizer = Tokenizer.from_dir(rewrite(tmp_path, move_last, tiny_dir))
    assert tokenizer.vocab_size == 515
    assert tokenizer.holes == {511, 512, 513}
    with pytest.raises(InvalidRequest, match=r"token id 512 .* outside 3 unused ids"):
        tokenizer.decode([512])


def test_a_word_level_vocabulary_works_too(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "<|im_end|>": 3}, "[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode("a b c a", add_special_tokens=True)
    assert ids == [1, 2, 0, 1]
    assert tokenizer.decode(ids) == backend.decode(ids) == "a b a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a b [UNK] a"
    stream = tokenizer.detokenizer()
    assert [stream.push([i]) for i in ids] == ["a", " b", "", " a"]
    assert tokenizer.token_text(2) == "b"


def test_importing_is_light() -> None:
    code = (
        "import sys, lfm2_gpu.tokenizer, lfm2_gpu.chat, lfm2_gpu.detokenizer; "
        "print({'torch', 'tokenizers', 'jinja2', 'numpy'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("unit", ["<|im_end|>", "< | ", "a", "🌊", "<", "\n ", "<|im_end|"])
@pytest.mark.parametrize("trusted", [False, True])
def test_time_is_linear(tiny_dir: Path, unit: str, trusted: bool) -> None:
    tokenizer = Tokenizer.from_dir(tiny_dir)

    def seconds(n: int) -> float:
        times = []
        for _ in range(2):
            start = time.process_time()
            tokenizer.decode(
                tokenizer.encode(unit * n, add_special_tokens=False, allow_special=trusted)
            )
            times.append(time.process_time() - start)
        return min(times)

    # 8 times the text takes 8 times as long if linear and 64 times if quadratic
    assert seconds(16_000) < 24 * max(seconds(2_000), 1e-3)
