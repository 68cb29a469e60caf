"""What a caller may ask for: every range, and messages that name field, value and want."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lfm2_gpu.api import FinishReason, SamplingDefaults, SamplingParams
from lfm2_gpu.errors import InvalidRequest, Lfm2Error, MissingExtra

NAN, INF = math.nan, math.inf
NOT_NUMBERS: tuple[object, ...] = ("1", True, [1], 1j)
NOT_INTEGERS: tuple[object, ...] = (1.0, "1", True, NAN)
# field: (values at the edges of its range, values just outside and of wrong types)
FIELDS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "n": ((1, 128), (0, -1, 129, 10**9, None, *NOT_INTEGERS)),
    "temperature": ((0, 0.0, 1e-320, 100, None), (NAN, INF, -INF, -0.1, 100.1, *NOT_NUMBERS)),
    "top_p": ((1e-9, 1, None), (0, -0.5, 1.0001, NAN, INF, *NOT_NUMBERS)),
    "top_k": ((0, -1, 1, 2**31 - 1, None), (-2, 2**31, *NOT_INTEGERS)),
    "min_p": ((0, 1, None), (-1e-9, 1.1, NAN, *NOT_NUMBERS)),
    "repetition_penalty": ((0.01, 1, 100, None), (0, -1, NAN, INF, 101, *NOT_NUMBERS)),
    "presence_penalty": ((-2, 2), (-2.1, 2.1, NAN, None, *NOT_NUMBERS)),
    "frequency_penalty": ((-2, 2), (-2.1, 2.1, NAN, None, *NOT_NUMBERS)),
    "seed": ((0, -(2**63), 2**64 - 1, None), (-(2**63) - 1, 2**64, *NOT_INTEGERS)),
    "stop": (("x", ["x", "y"], (), ["x"] * 64), ("", ["x", ""], ["x"] * 65, [1], 5, None)),
    "stop_token_ids": (([0, 2**31 - 1], ()), ([-1], [2**31], [1.5], ["5"], [True], "12", None)),
    "bad_words": ((["a"], ()), ("word", [""], [1], None)),
    "max_tokens": ((1, None), (0, -1, 2**31, *NOT_INTEGERS)),
    "min_tokens": ((0, 5), (-1, None, *NOT_INTEGERS)),
    "logprobs": ((0, 20, None), (-1, 21, *NOT_INTEGERS)),
    "prompt_logprobs": ((0, 20, None), (-1, 21, 10**9, *NOT_INTEGERS)),
    "logit_bias": (({5: -100, 6: 100.0}, {}), ({5: 101}, {-1: 0}, {"5": 0}, {5: NAN}, [5], None)),
    "allowed_token_ids": (([1], None), ([], [-1], [2**31], "1")),
    "include_stop_str_in_output": ((True, False), (1, None, "yes")),
    "ignore_eos": ((True, False), (0, None)),
    "detokenize": ((True, False), (1, None)),
    "skip_special_tokens": ((True, False), (1, None)),
    "structured_outputs": ((None,), ({"json": {}}, "x")),
}


def test_every_field_is_covered() -> None:
    assert set(FIELDS) == {f.name for f in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, (good, _) in FIELDS.items() for v in good]
)
def test_sampling_params_take(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, bad) in FIELDS.items() for v in bad])
def test_sampling_params_refuse(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert str(error.value).startswith(name)


def test_messages_name_value_and_want() -> None:
    with pytest.raises(InvalidRequest, match=r"^temperature is nan, want a finite number in \["):
        SamplingParams(temperature=NAN)
    with pytest.raises(InvalidRequest, match=r"^max_tokens is -3, want an integer in \[1, "):
        SamplingParams(max_tokens=-3)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 9, want at most max_tokens"):
        SamplingParams(min_tokens=9, max_tokens=8)
    with pytest.raises(InvalidRequest, match="detokenize is False, want true, since stop"):
        SamplingParams(stop="x", detokenize=False)


def test_values_are_normalised_and_frozen() -> None:
    ids, bias = [1, 2], {3: 1.0}
    params = SamplingParams(stop="x", top_k=-1, stop_token_ids=ids, logit_bias=bias)
    assert (params.stop, params.top_k, params.stop_token_ids) == (("x",), 0, (1, 2))
    # the caller's own containers may change afterwards
    ids.append(9)
    bias[4] = 2.0
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_defaults_fill_only_what_is_open() -> None:
    defaults = SamplingDefaults(temperature=0.1, top_k=50, repetition_penalty=1.05)
    filled = SamplingParams(temperature=0.0, n=2).with_defaults(defaults)
    expected = SamplingParams(
        temperature=0.0, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.05, n=2
    )
    assert filled == expected
    assert filled.with_defaults(SamplingDefaults(temperature=9.0)) == filled


def test_finish_reason_prints_as_the_api_spells_it() -> None:
    assert f"{FinishReason.LENGTH}" == "length" == FinishReason.LENGTH


def test_errors_have_one_base_and_their_standard_kind() -> None:
    assert issubclass(InvalidRequest, (Lfm2Error, ValueError))
    error = MissingExtra("matplotlib", "bench")
    assert isinstance(error, ImportError)
    assert str(error) == "matplotlib is not installed: pip install 'lfm2-gpu[bench]'"
