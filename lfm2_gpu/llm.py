"""LLM: text in, text out, offline. Joins loader, engine, tokenizer and chat template."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from lfm2_gpu.api import RequestOutput, SamplingParams
from lfm2_gpu.chat import ChatTemplate
from lfm2_gpu.devices import select_device
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.memory import free_bytes, plan_engine
from lfm2_gpu.engine.runner import Runner
from lfm2_gpu.errors import CapacityError, EngineError, InvalidRequest
from lfm2_gpu.files import read_json
from lfm2_gpu.interrupts import uninterrupted
from lfm2_gpu.jobs import Job, Progress
from lfm2_gpu.loader import DTYPES, load_model
from lfm2_gpu.locate import locate
from lfm2_gpu.output import ChoiceBuilder, bad_word_ids
from lfm2_gpu.tokenizer import Tokenizer
from lfm2_gpu.vendor import sampling_defaults

__all__ = ["LLM", "Prompt"]

logger = logging.getLogger(__name__)

Prompt: TypeAlias = "str | Mapping[str, Any]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"


class LLM:
    """A model ready to generate.

    Args:
        model: A checkpoint directory, a hub id, or ``pocket``, the model that ships inside.
        device: ``auto``, ``cuda`` or ``cpu``.
        dtype: ``auto`` (the checkpoint's on a GPU, float32 on a CPU), ``bfloat16``, ``float16`` or
            ``float32``.
        max_model_len: Tokens of a request, prompt and output together. Default: the vendor's
            context for the model.
        max_num_seqs: Choices that run at once. Default: 256 on a GPU, 32 on a CPU.
        max_num_batched_tokens: Tokens of one step. Default: 8,192 on a GPU, 512 on a CPU.
        gpu_memory_utilization: Share of the free device memory to take; on a CPU, of a quarter of
            the free memory.
        num_gpu_blocks_override: KV pages of 64 tokens, instead of what fits.
        seed: Requests without a seed draw theirs from it, in order of arrival.
        revision: Of a hub id.
        skip_tokenizer_init: Work on token ids only.

    Raises:
        InvalidRequest: An option is out of range.
        ModelFileError: The checkpoint is damaged or of a kind that is not supported.
        CapacityError: The device is too small.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.97,
        num_gpu_blocks_override: int | None = None,
        seed: int = 0,
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
            raise InvalidRequest(f"model is {model!r}, want a folder or a hub id", param="model")
        model = os.fspath(model)
        _check_utilization(gpu_memory_utilization)
        _check_size("max_model_len", max_model_len)
        _check_size("max_num_seqs", max_num_seqs)
        _check_size("max_num_batched_tokens", max_num_batched_tokens)
        _check_size("num_gpu_blocks_override", num_gpu_blocks_override)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InvalidRequest(f"seed is {seed!r}, want an integer", param="seed")
        target, message = select_device(device)
        # a GPU was hoped for: that the CPU runs instead is not left to those who log everything
        logger.log(
            logging.WARNING if (device, target.type) == ("auto", "cpu") else logging.INFO, message
        )
        on_gpu = target.type == "cuda"
        folder = locate(model, revision=revision)
        self.tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        if not skip_tokenizer_init:
            self.tokenizer = Tokenizer.from_dir(folder)
            self._template = ChatTemplate.from_dir(folder, self.tokenizer, name=model)
        try:
            loaded = load_model(
                folder,
                device=target,
                dtype=_dtype(dtype, on_gpu),
                max_model_len=max_model_len,
                progress=sys.stderr.isatty(),
            )
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"the weights do not fit the device: {error}") from error
        sizes = loaded.parameter_bytes().items()
        logger.info("weights: %s", ", ".join(f"{k} {v / 2**20:,.1f} MiB" for k, v in sizes if v))
        config = loaded.config
        vocab_size = config.vocab_size
        unused_ids: tuple[int, ...] = ()
        if self.tokenizer is not None:
            vocab_size = min(vocab_size, self.tokenizer.vocab_size)
            unused_ids = tuple(i for i in sorted(self.tokenizer.holes) if i < vocab_size)
        engine_config = plan_engine(
            config,
            dtype=loaded.dtype,
            budget=free_bytes(target, gpu_memory_utilization),
            max_model_len=max_model_len or config.default_max_model_len,
            # a checked size is never 0
            max_num_seqs=max_num_seqs or (256 if on_gpu else 32),
            max_num_batched_tokens=max_num_batched_tokens or (8192 if on_gpu else 512),
            vocab_size=vocab_size,
            unused_ids=unused_ids,
            num_gpu_blocks_override=num_gpu_blocks_override,
        )
        generation = folder / "generation_config.json"
        defaults = sampling_defaults(
            config, model, read_json(generation) if generation.exists() else {}
        )
        self.default_sampling_params = SamplingParams().with_defaults(defaults)
        try:
            self.engine = Engine(Runner(loaded, engine_config))
        # a CPU out of memory has no error of its own
        except RuntimeError as error:
            raise CapacityError(
                f"the state of {engine_config.num_pages} pages and {engine_config.max_num_seqs} "
                f"slots does not fit the device: {error}"
            ) from error
        self._defaults = defaults
        self._seeds = random.Random(seed)
        self._count = 0
        self._jobs: dict[int, Job] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all together.

        Args:
            prompts: Strings, or ``{"prompt_token_ids": [...]}``; one or many.
            sampling_params: For all, or one for each.
            use_tqdm: Show progress and tokens per second.

        Returns:
            One output for each prompt, in order.

        Raises:
            InvalidRequest: A prompt or a parameter cannot be honoured. Nothing is generated then.
        """
        one = isinstance(prompts, (str, Mapping))
        many: Sequence[Any] = [prompts] if one else _sequence("prompts", prompts)
        encoded = [self._encode(prompt) for prompt in many]
        return self._run(encoded, self._params_for(sampling_params, len(many)), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations through the checkpoint's chat template.

        Args:
            messages: One conversation (a list of ``{"role", "content"}``), or a list of them.
            sampling_params: For all, or one for each.
            tools: JSON-schema tools that the model may call, as the OpenAI API lists them.
            use_tqdm: Show progress and tokens per second.

        Raises:
            InvalidRequest: A message or parameter cannot be honoured.
        """
        many = _sequence("messages", messages)
        if many and isinstance(many[0], Mapping):
            many = [many]
        encoded = [self._encode_chat(conversation, tools) for conversation in many]
        return self._run(encoded, self._params_for(sampling_params, len(many)), use_tqdm)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like ``generate`` or ``chat`` for one prompt, yielding the output so far as it grows.

        Closing the iterator ends the request.
        """
        if isinstance(prompt, (str, Mapping)):
            encoded = self._encode(prompt)
        else:
            encoded = self._encode_chat(prompt, tools)
        (params,) = self._params_for(sampling_params, 1)
        jobs: list[Job] = []
        try:
            job = self._submit(encoded, params, jobs, watched=True)
            finished = False
            while not finished:
                # a step taken for another caller moves this one too, maybe to its end
                while not job.moved:
                    self._step()
                job.moved, finished = False, job.output.finished
                yield job.snapshot()
        finally:
            self._drop(jobs)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer().encode(prompt, add_special_tokens=True)
        if not isinstance(prompt, Mapping):
            got = type(prompt).__name__
            raise InvalidRequest(f"prompt is {got}, want a string or token ids", param="prompt")
        if set(prompt) - {"prompt"} != {"prompt_token_ids"}:
            raise InvalidRequest(
                f"prompt has the keys {list(prompt)!r}, want prompt_token_ids", param="prompt"
            )
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise InvalidRequest(f"prompt is {type(text).__name__}, want a string", param="prompt")
        return text, list(_sequence("prompt_token_ids", prompt["prompt_token_ids"]))

    def _encode_chat(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str | None, list[int]]:
        tokenizer = self._need_tokenizer()
        assert self._template is not None
        segments = self._template.render(messages, tools=tools)
        text = "".join(piece for piece, _ in segments)
        return text, tokenizer.encode_segments(segments)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                "the prompt is text and skip_tokenizer_init is set, want prompt_token_ids",
                param="prompt",
            )
        return self.tokenizer

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params
        if isinstance(params, SamplingParams):
            params = [params] * count
        for p in _sequence("sampling_params", params):
            if not isinstance(p, SamplingParams):
                got = type(p).__name__
                raise InvalidRequest(
                    f"sampling_params holds {got}, want SamplingParams", param="sampling_params"
                )
        if len(params) != count:
            raise InvalidRequest(
                f"{len(params)} sampling_params for {count} prompts, want one for each",
                param="sampling_params",
            )
        return [p.with_defaults(self._defaults) for p in params]

    def _check(self, ids: Sequence[int], params: SamplingParams) -> None:
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise InvalidRequest(
                "stop and bad_words are text and skip_tokenizer_init is set, want stop_token_ids",
                param="stop" if params.stop else "bad_words",
            )
        self.engine.validate(ids, params)

    def _submit(
        self,
        encoded: tuple[str | None, list[int]],
        params: SamplingParams,
        jobs: list[Job],
        *,
        watched: bool = False,
    ) -> Job:
        """Hand a request to the engine and append its job to ``jobs``, both or neither."""
        text, ids = encoded
        self._check(ids, params)
        bad_words = bad_word_ids(params.bad_words, self.tokenizer) if self.tokenizer else []
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        self._count += 1
        request_id = str(self._count)
        with uninterrupted():
            requests = self.engine.add(
                request_id,
                ids,
                params,
                seed=seed,
                bad_words=bad_words,
                watched=watched or bool(params.stop),
            )
            builders = [ChoiceBuilder(r.index, params, self.tokenizer) for r in requests]
            output = RequestOutput(
                request_id=request_id,
                prompt=text,
                prompt_token_ids=ids,
                outputs=[builder.output for builder in builders],
                finished=False,
                seed=seed,
            )
            job = Job(requests, builders, output, self.tokenizer)
            self._jobs.update((id(request), job) for request in requests)
            jobs.append(job)
        return job

    def _drop(self, jobs: Sequence[Job]) -> None:
        """Forget jobs; what still runs of them ends."""
        with uninterrupted():
            for job in jobs:
                self.engine.abort(job.requests)
                for request in job.requests:
                    del self._jobs[id(request)]

    def _run(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        # all are looked at before the first one takes a seed
        for (_, ids), p in zip(encoded, params, strict=True):
            self._check(ids, p)
        jobs: list[Job] = []
        try:
            for item, p in zip(encoded, params, strict=True):
                self._submit(item, p, jobs)
            with Progress(len(jobs), enabled=use_tqdm) as progress:
                waiting = set(jobs)
                while waiting:
                    # an open stream may move in these steps too, and end
                    for job in waiting.intersection(self._step()):
                        waiting.remove(job)
                        progress.add(job.output)
        finally:
            # an interrupt leaves nothing behind
            self._drop(jobs)
        return [job.output for job in jobs]

    def _step(self) -> list[Job]:
        """One engine step; the jobs that it finished."""
        if not self.engine.has_unfinished:
            raise EngineError("a request was lost: the engine has no work and its caller waits")
        finished: list[Job] = []
        with uninterrupted():
            try:
                touched = self.engine.step()
            except RuntimeError as error:
                raise EngineError(f"the device failed in a step: {error}") from error
            for request in touched:
                job = self._jobs[id(request)]
                if not job.output.finished:
                    job.advance(request, self.engine)
                    if job.output.finished:
                        finished.append(job)
        return finished


def _check_size(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and 0 < value < 2**31):  # type: ignore[operator]
        raise InvalidRequest(f"{name} is {value!r}, want a positive integer", param=name)


def _check_utilization(value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:  # type: ignore[operator]
        raise InvalidRequest(
            f"gpu_memory_utilization is {value!r}, want (0, 1]", param="gpu_memory_utilization"
        )


def _sequence(name: str, value: object) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidRequest(f"{name} is {type(value).__name__}, want a list", param=name)
    return value


def _dtype(name: str, on_gpu: bool) -> torch.dtype | None:
    """The dtype to run in; ``None`` is the checkpoint's own."""
    if name == "auto":
        # CPUs without bf16 units are slow in it, and fp32 is the more exact one
        return None if on_gpu else torch.float32
    if name not in DTYPES:
        raise InvalidRequest(f"dtype is {name!r}, want auto, {', '.join(DTYPES)}", param="dtype")
    return DTYPES[name]
