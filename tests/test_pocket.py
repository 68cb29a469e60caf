"""The embedded pocket checkpoint: its files, shape, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

POCKET = Path(__file__).resolve().parents[1] / "lfm2_gpu" / "assets" / "pocket"
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "NOTICE",
)
SPECIAL_IDS = {
    "<|pad|>": 0,
    "<|startoftext|>": 1,
    "<|endoftext|>": 2,
    "<|im_start|>": 6,
    "<|im_end|>": 7,
    "<|tool_list_start|>": 8,
    "<|tool_list_end|>": 9,
    "<|tool_call_start|>": 10,
    "<|tool_call_end|>": 11,
    "<|tool_response_start|>": 12,
    "<|tool_response_end|>": 13,
}
LFM2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOOL = {
    "name": "get_time",
    "description": "Current time in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def read_json(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((POCKET / name).read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((POCKET / "chat_template.jinja").read_text("utf-8"))


def test_files_are_present_and_small() -> None:
    missing = [name for name in FILES if not (POCKET / name).is_file()]
    assert missing == []
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= 16_000_000


def test_config_shape() -> None:
    config = read_json("config.json")
    assert config["model_type"] == "lfm2_moe"
    assert set(config["layer_types"]) == {"conv", "full_attention"}
    assert len(config["layer_types"]) == config["num_hidden_layers"]
    assert config["num_experts"] >= 8
    assert config["num_experts_per_tok"] >= 2
    assert config["num_dense_layers"] >= 2
    assert config["use_expert_bias"] is True
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        assert config[name] % 64 == 0, name


def test_generation_config_ends_turns() -> None:
    generation = read_json("generation_config.json")
    assert generation["bos_token_id"] == SPECIAL_IDS["<|startoftext|>"]
    assert generation["eos_token_id"] == [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]
    assert generation["pad_token_id"] == SPECIAL_IDS["<|pad|>"]


def test_weights_are_bfloat16_and_finite() -> None:
    config = read_json("config.json")
    count = 0
    with safe_open(POCKET / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        for name in names:
            tensor = weights.get_tensor(name)
            bias = name.endswith("expert_bias")
            assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
            assert bool(torch.isfinite(tensor).all()), name
            count += tensor.numel()
    assert count == 7_813_664
    sparse = config["num_hidden_layers"] - config["num_dense_layers"]
    # tied head, and one tensor per expert and matrix
    assert "lm_head.weight" not in names
    assert sum(".experts." in name for name in names) == sparse * config["num_experts"] * 3


def test_expert_bias_is_used_in_every_sparse_layer() -> None:
    config = read_json("config.json")
    with safe_open(POCKET / "model.safetensors", framework="pt") as weights:
        for layer in range(config["num_dense_layers"], config["num_hidden_layers"]):
            bias = weights.get_tensor(f"model.layers.{layer}.feed_forward.expert_bias")
            assert bias.shape == (config["num_experts"],)
            assert float(bias.abs().max()) > 0, layer
            assert float(bias.std()) > 0, layer


def test_tokenizer_special_ids(tokenizer: Tokenizer) -> None:
    assert {name: tokenizer.token_to_id(name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]
    assert tokenizer.encode("Hello world").ids[0] == SPECIAL_IDS["<|startoftext|>"]


def test_tokenizer_splits_as_lfm2() -> None:
    split = read_json("tokenizer.json")["pre_tokenizer"]["pretokenizers"]
    assert split[0]["pattern"] == {"Regex": LFM2_REGEX}
    assert split[0]["behavior"] == "Isolated"
    assert split[1]["type"] == "ByteLevel"
    assert split[1]["add_prefix_space"] is False
    assert split[1]["use_regex"] is False


@pytest.mark.parametrize(
    "text", ["Hello world", "naïve café, 日本語 🙂", "a\n\n\tb  c", "\x00\x7f"]
)
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_template_renders_a_tool_dialogue(template: jinja2.Template, tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "get_time", "arguments": {"city": 'O"x', "n": 3, "day": True}}}
    text = template.render(
        bos_token="<|startoftext|>",
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"time": "9:30"}'},
        ],
        tools=[TOOL, {"type": "function", "function": TOOL}],
        add_generation_prompt=True,
    )
    listed = json.dumps(TOOL)
    assert text == (
        "<|startoftext|><|im_start|>system\nBe short.\n"
        f"List of tools: <|tool_list_start|>[{listed}, {listed}]<|tool_list_end|><|im_end|>\n"
        "<|im_start|>user\nTime?<|im_end|>\n"
        "<|im_start|>assistant\n<|tool_call_start|>"
        '[get_time(city="O\\"x", n=3, day=True)]<|tool_call_end|><|im_end|>\n'
        '<|im_start|>tool\n<|tool_response_start|>{"time": "9:30"}<|tool_response_end|><|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    special = [i for i in ids if i in SPECIAL_IDS.values()]
    assert special == [1, 6, 8, 9, 7, 6, 7, 6, 10, 11, 7, 6, 12, 13, 7, 6]


def test_transformers_loads_it(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = transformers.Lfm2MoeForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    model.eval()
    text = "And the LORD spake unto Moses, saying, Speak unto the children of Israel"
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    # a model that learned nothing is at ln 4096 = 8.3, the shipped one near 1.6
    assert float(loss) < 2.0
