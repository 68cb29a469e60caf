"""LLM as a user holds it: prompts and chats in, text out, on a tiny checkpoint with a tokenizer."""

from __future__ import annotations

import itertools
import logging
import signal
from pathlib import Path

import pytest

from lfm2_gpu.api import FinishReason, RequestOutput, SamplingParams
from lfm2_gpu.errors import CapacityError, InvalidRequest, ModelFileError
from lfm2_gpu.llm import LLM
from tiny_tokenizer import save_tiny_tokenizer

checkpoints = pytest.importorskip("checkpoints")
pytest.importorskip("transformers")


def greedy(**fields: object) -> SamplingParams:
    base = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.0}
    return SamplingParams(**(base | fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-moe")
    checkpoints.build(path, seed=5, moe=True, vocab_size=512)
    save_tiny_tokenizer(path, vocab_size=500)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), device="cpu", max_model_len=512)


def text_of(output: RequestOutput) -> str:
    return output.outputs[0].text


def test_prompts_come_back_in_order_with_all_their_fields(llm: LLM) -> None:
    texts = ["The river", "A", "Zürich 日本"]
    outputs = llm.generate(texts, greedy(), use_tqdm=False)
    assert [o.prompt for o in outputs] == texts
    assert len({o.request_id for o in outputs}) == 3
    for output in outputs:
        (choice,) = output.outputs
        assert output.finished
        assert output.prompt_token_ids[0] == 1
        assert len(choice.token_ids) == 20
        assert choice.finish_reason is FinishReason.LENGTH
        assert llm.tokenizer is not None
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        metrics = output.metrics
        assert metrics is not None
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert llm.generate("A", greedy(), use_tqdm=False)[0].outputs == outputs[1].outputs


def test_token_prompts_and_one_set_of_parameters_each(llm: LLM) -> None:
    ids = llm.generate("The river", greedy(), use_tqdm=False)[0].prompt_token_ids
    many = [{"prompt_token_ids": ids}, "The river"]
    short, long = llm.generate(many, [greedy(max_tokens=3), greedy(max_tokens=9)], use_tqdm=False)
    assert len(short.outputs[0].token_ids) == 3
    assert long.outputs[0].token_ids[:3] == short.outputs[0].token_ids
    assert len(long.outputs[0].token_ids) == 9


def test_stop_strings_cut_the_text_wherever_the_tokens_fall(llm: LLM) -> None:
    whole = text_of(llm.generate("The river", greedy(max_tokens=40), use_tqdm=False)[0])
    for start in (3, 7, len(whole) // 2):
        stop = whole[start : start + 4]
        before = whole[: whole.index(stop)]
        (output,) = llm.generate("The river", greedy(max_tokens=40, stop=stop), use_tqdm=False)
        (choice,) = output.outputs
        assert (choice.text, choice.stop_reason) == (before, stop)
        assert choice.finish_reason is FinishReason.STOP
        wanted = greedy(max_tokens=40, stop=[stop, "never"], include_stop_str_in_output=True)
        assert text_of(llm.generate("The river", wanted, use_tqdm=False)[0]) == before + stop
    assert not llm.engine.has_unfinished


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(llm: LLM) -> None:
    (free,) = llm.generate("The river", greedy(), use_tqdm=False)
    ids = free.outputs[0].token_ids
    stop, at = ids[8], ids.index(ids[8])
    (output,) = llm.generate("The river", greedy(stop_token_ids=[stop]), use_tqdm=False)
    (choice,) = output.outputs
    assert choice.token_ids == ids[: at + 1]
    assert choice.stop_reason == stop
    assert llm.tokenizer is not None
    assert choice.text == llm.tokenizer.decode(ids[:at])
    wanted = greedy(stop_token_ids=[stop], include_stop_str_in_output=True)
    (output,) = llm.generate("The river", wanted, use_tqdm=False)
    assert text_of(output) == llm.tokenizer.decode(ids[: at + 1])


def test_bad_words_do_not_appear(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (free,) = llm.generate("The river", greedy(max_tokens=30), use_tqdm=False)
    words = {token: llm.tokenizer.token_text(token) for token in free.outputs[0].token_ids}
    token, word = next((t, w) for t, w in words.items() if w.isascii() and w.isalpha())
    (output,) = llm.generate("The river", greedy(max_tokens=30, bad_words=[word]), use_tqdm=False)
    assert token not in output.outputs[0].token_ids
    assert output.outputs[0].token_ids != free.outputs[0].token_ids


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    wanted = greedy(max_tokens=4, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("The river", wanted, use_tqdm=False)
    (choice,) = output.outputs
    assert choice.logprobs is not None
    assert len(choice.logprobs) == 4
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry[token].rank == 1
        assert len(entry) == 2
        assert all(lp.decoded_token is not None for lp in entry.values())
    total = sum(e[t].logprob for e, t in zip(choice.logprobs, choice.token_ids, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert token in entry


def test_seeds_repeat_and_choices_differ(llm: LLM) -> None:
    wanted = greedy(temperature=1.5, n=3, seed=42)
    first, again = llm.generate(["A", "A"], wanted, use_tqdm=False)
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3
    unseeded = llm.generate(["A", "A"], greedy(temperature=1.5), use_tqdm=False)
    assert unseeded[0].seed != unseeded[1].seed
    again = llm.generate(["A"], greedy(temperature=1.5, seed=unseeded[0].seed), use_tqdm=False)
    assert again[0].outputs == unseeded[0].outputs


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (whole,) = llm.generate("Zürich", greedy(max_tokens=30), use_tqdm=False)
    parts = list(llm.stream("Zürich", greedy(max_tokens=30)))
    assert [len(p.outputs[0].token_ids) for p in parts] == list(range(1, 31))
    for earlier, later in itertools.pairwise(parts):
        assert text_of(later).startswith(text_of(earlier))
    assert [p.finished for p in parts] == [False] * 29 + [True]
    assert parts[-1].outputs == whole.outputs


def test_two_streams_and_a_batch_take_turns(llm: LLM) -> None:
    alone = [text_of(llm.generate(p, greedy(), use_tqdm=False)[0]) for p in ("A", "B", "C")]
    first, second = llm.stream("A", greedy()), llm.stream("B", greedy())
    next(first)
    next(second)
    # the batch's steps carry both streams to their ends
    assert text_of(llm.generate("C", greedy(), use_tqdm=False)[0]) == alone[2]
    assert [text_of(p) for p in first][-1] == alone[0]
    assert [text_of(p) for p in second][-1] == alone[1]


def test_a_closed_stream_frees_its_request(llm: LLM) -> None:
    stream = llm.stream("A", greedy(max_tokens=200))
    next(stream)
    assert llm.engine.has_unfinished
    stream.close()
    assert not llm.engine.has_unfinished


def test_an_interrupt_waits_for_the_step_and_harms_no_stream(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = text_of(llm.generate("A", greedy(logprobs=0), use_tqdm=False)[0])
    stream = llm.stream("A", greedy(logprobs=0))
    next(stream)
    step, calls = llm.engine.step, itertools.count()

    def interrupted_step() -> object:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["B", "C"], greedy(), use_tqdm=False)
    assert len(llm.engine.scheduler.running) == 1
    *_, last = stream
    assert text_of(last) == alone
    assert last.outputs[0].logprobs is not None
    assert len(last.outputs[0].logprobs) == 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm.engine.has_unfinished


def test_a_request_without_a_token_to_draw_ends_alone(llm: LLM) -> None:
    assert llm.tokenizer is not None
    word = llm.tokenizer.token_text(40)
    hopeless = greedy(allowed_token_ids=[40], bad_words=[word])
    good, bad = llm.generate(["A", "A"], [greedy(), hopeless], use_tqdm=False)
    assert bad.outputs[0].finish_reason is FinishReason.ERROR
    assert bad.error is not None
    assert "every token is ruled out" in bad.error
    assert good.outputs == llm.generate("A", greedy(), use_tqdm=False)[0].outputs


def test_values_too_small_for_fp32_are_still_meant(llm: LLM) -> None:
    (tiny,) = llm.generate("A", greedy(temperature=1.0, top_p=1e-46), use_tqdm=False)
    assert tiny.outputs == llm.generate("A", greedy(), use_tqdm=False)[0].outputs


def test_a_refused_request_takes_no_seed(folder: Path) -> None:
    def draw(refuse: bool) -> int | None:
        llm = LLM(str(folder), device="cpu", max_model_len=128, seed=3)
        if refuse:
            with pytest.raises(InvalidRequest):
                llm.generate(["A", {"prompt_token_ids": []}], greedy(), use_tqdm=False)
        return llm.generate("A", greedy(), use_tqdm=False)[0].seed

    assert draw(refuse=True) == draw(refuse=False)


def test_bad_words_may_name_control_tokens(llm: LLM) -> None:
    wanted = greedy(bad_words=["<|im_end|>"], allowed_token_ids=[0, 7], logit_bias={7: 50.0})
    (output,) = llm.generate("A", wanted, use_tqdm=False)
    assert set(output.outputs[0].token_ids) == {0}


def test_metrics_are_whole_and_snapshots_stay(llm: LLM) -> None:
    (free,) = llm.generate("The river", greedy(max_tokens=40), use_tqdm=False)
    wanted = greedy(max_tokens=40, n=2, stop=text_of(free)[5:8])
    parts = list(llm.stream("The river", wanted))
    metrics = parts[-1].metrics
    assert metrics is not None
    assert metrics.finished_time is not None
    assert parts[0].metrics is not None
    assert parts[0].metrics.finished_time is None


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    (output,) = llm.chat(messages, greedy(), use_tqdm=False)
    assert output.prompt == (
        "<|startoftext|><|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    # the user's own mark stays text: one end of turn, and one start before each turn
    assert output.prompt_token_ids.count(7) == 1
    assert output.prompt_token_ids.count(6) == 2
    both = llm.chat([messages, messages], greedy(), use_tqdm=False)
    assert [o.outputs for o in both] == [output.outputs] * 2
    assert [text_of(p) for p in llm.stream(messages, greedy())][-1] == text_of(output)


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ({"prompt_token_ids": []}, {}, "the prompt is empty"),
        ({"prompt_token_ids": [512]}, {}, "prompt_token_ids holds 512"),
        ({"prompt_token_ids": [505]}, {}, r"prompt_token_ids holds 505, want integers in \[0, 500"),
        ({"tokens": [1]}, {}, "prompt has the keys"),
        ("river " * 600, {}, "want at most 511"),
        ("A", {"structured_outputs": {"regex": "a"}}, "structured_outputs is not supported"),
        ("A", {"temperature": float("nan")}, "temperature is nan"),
        ("A", {"max_tokens": -1}, "max_tokens is -1"),
        ("A", {"stop": "x", "detokenize": False}, "detokenize is False"),
        ("A", {"temperature": 10**400}, "temperature is 1000"),
        ("A", {"seed": 10**5000}, "seed is too long to print"),
        ("A", {"stop": "\udc00"}, "half of a surrogate pair"),
        ("A", {"allowed_token_ids": [7], "min_tokens": 2, "ignore_eos": False}, "end tokens only"),
        (None, {}, "prompt is NoneType, want a string or token ids"),
        (3, {}, "prompt is int"),
        ({"prompt_token_ids": None}, {}, "prompt_token_ids is NoneType, want a list"),
        ({"prompt_token_ids": [1], 5: 5}, {}, "prompt has the keys"),
        ({"prompt_token_ids": [1], "prompt": 5}, {}, "prompt is int, want a string"),
    ],
)
def test_bad_input_is_refused_and_nothing_runs(
    llm: LLM, prompt: object, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(["fine", prompt], greedy(**fields), use_tqdm=False)  # type: ignore[list-item]
    assert not llm.engine.has_unfinished


def test_arguments_of_the_wrong_kind_are_refused(llm: LLM) -> None:
    for prompts in (None, 3, b"abc"):
        with pytest.raises(InvalidRequest, match="prompts is"):
            llm.generate(prompts, use_tqdm=False)  # type: ignore[arg-type]
    for params in ([None], {"temperature": 0}, 5):
        with pytest.raises(InvalidRequest, match="sampling_params"):
            llm.generate("A", params, use_tqdm=False)  # type: ignore[arg-type]
    for messages in (None, 5, {"role": "user", "content": "a"}):
        with pytest.raises(InvalidRequest, match="messages is"):
            llm.chat(messages, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="model is None"):
        LLM(None)  # type: ignore[arg-type]


def test_token_ids_alone_need_no_tokenizer(tmp_path: Path) -> None:
    checkpoints.build(tmp_path, seed=5)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        LLM(str(tmp_path), device="cpu")
    bare = LLM(str(tmp_path), device="cpu", skip_tokenizer_init=True, max_model_len=128)
    (output,) = bare.generate({"prompt_token_ids": [5, 6]}, greedy(), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 20
    assert output.outputs[0].text == ""
    for prompt, fields in (("text", {}), ({"prompt_token_ids": [5]}, {"stop": ["x"]})):
        with pytest.raises(InvalidRequest, match="skip_tokenizer_init is set"):
            bare.generate(prompt, greedy(**fields), use_tqdm=False)


def test_sampling_defaults_are_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 11}')
    llm = LLM(str(tmp_path), device="cpu", max_model_len=128)
    params = llm.default_sampling_params
    assert (params.temperature, params.top_k) == (0.7, 11)


def test_what_does_not_fit_is_clamped_aloud(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lfm2_gpu"):
        llm = LLM(str(folder), device="cpu", max_model_len=4096, num_gpu_blocks_override=5)
    assert "max_model_len 4096 -> clamped to 320" in caplog.text
    assert llm.engine.config.max_model_len == 320


def test_more_pages_than_memory_is_an_error_with_the_number(folder: Path) -> None:
    with pytest.raises(CapacityError, match="the state of 1000000000 pages"):
        LLM(str(folder), device="cpu", num_gpu_blocks_override=10**9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', want auto"),
        ({"device": "tpu"}, "device is 'tpu', want auto, cuda or cpu"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1, want a positive integer"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override is 0"),
        ({"num_gpu_blocks_override": "3"}, "num_gpu_blocks_override is '3'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0, want a positive integer"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, want a positive integer"),
        ({"max_model_len": 0}, "max_model_len is 0, want a positive integer"),
        ({"max_model_len": 10**6}, "max_model_len is 1000000, want at most 4096"),
        ({"gpu_memory_utilization": None}, "gpu_memory_utilization is None"),
        ({"seed": [1]}, "seed is"),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        LLM(str(folder), **{"device": "cpu", **options})  # type: ignore[arg-type]
