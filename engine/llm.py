"""LLM: prompts in, text out; who asked for what, on top of the core that computes it."""

import gc
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core import Core
from engine.decode import DecodeWorker
from engine.detokenizer import Detokenizer
from engine.interrupt import deferred
from engine.pd_core import PDCore
from engine.pipeline import DecodePipeline
from engine.pipeline_needs import ask_for_connections, check_stage_sms
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.stats import as_text
from engine.text import chat_token_ids, encode_prompt, load_tokenizer
from models.config import ModelConfig
from models.fetch import resolve

Prompt = str | Sequence[int]
Output = dict[str, Any]


@dataclass(eq=False)
class _Job:
    """A request, its text so far, and what of it has not been handed out."""

    request: Request
    owner: object  # the call that wants its outputs; None: whoever calls `step`
    detokenizer: Detokenizer
    is_live: bool  # text is made token by token, not once at the end
    new_token_ids: list[int] = field(default_factory=list)
    new_text: list[str] = field(default_factory=list)

    def output(self) -> Output:
        """What is new; and all there is, once it has ended."""
        request = self.request
        is_finished = request.state is RequestState.FINISHED
        output: Output = {
            "request_id": request.request_id,
            "new_text": "".join(self.new_text),
            "new_token_ids": self.new_token_ids,
            "finished": is_finished,
        }
        self.new_token_ids, self.new_text = [], []
        if is_finished:
            output |= {
                "text": self.detokenizer.text,
                "token_ids": request.generated_token_ids,
                "finish_reason": request.finish_reason,
                "logprobs": request.logprobs if request.params.logprobs is not None else None,
                "metrics": request.metrics(),
            }
        return output


class LLM:
    """One model on one device or two. Use it in a `with` statement, or call `exit` at the end.

    Options are the fields of `engine.config.EngineConfig`. An unknown one is a TypeError, a wrong
    value a ValueError, a checkpoint that is not there a FileNotFoundError.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self.config = EngineConfig.from_options(model, **options)
        ask_for_connections(self.config)
        devices = self.config.resolve_two_devices() or (self.config.resolve_device(),)
        self.config.resolve_kernels(devices[0])
        check_stage_sms(self.config, devices[-1])
        folder = resolve(model if isinstance(model, str) else Path(model))
        self.model_config = ModelConfig.from_folder(folder)
        self.tokenizer = load_tokenizer(folder)
        kind = Core if len(devices) == 1 else PDCore
        self._core: Core | PDCore | None = kind(
            self.config, self.model_config, folder, *map(torch.device, devices)
        )
        self._jobs: dict[int, _Job] = {}
        self._touched: dict[object, dict[int, _Job]] = {}  # owner -> jobs with something new
        self._ids = itertools.count()
        self._is_busy = False
        self._given_up: list[Sequence[_Job]] = []  # by calls that ended meanwhile
        self._seeds = random.Random(self.config.seed)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.exit()

    def exit(self) -> None:
        """End every request and free the device's memory. A second call does nothing."""
        if self._core is None:
            return
        try:
            with self._undisturbed():
                for job in list(self._jobs.values()):
                    self._drop(job)
        finally:
            core, self._core = self._core, None
            self._touched.clear()
            try:
                core.close()
            finally:
                gc.collect()  # a traceback that somebody kept may hold the core in a cycle
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[Output]:
        """Complete every prompt; the outputs stand in the order of the prompts.

        prompts: one or several, each text or token ids; params: one for all or one for each.
        An output has text, token_ids, finish_reason ("stop" | "length"), logprobs and metrics. A
        prompt that cannot run is a ValueError before any is started. On an exception, Ctrl-C
        included, the call's requests are aborted and the engine goes on.
        """
        prompts = _as_prompts(prompts)
        owner = object()
        jobs = [
            self._job(prompt, p, owner, is_live=False)
            for prompt, p in zip(prompts, _as_params(params, len(prompts)), strict=True)
        ]
        outputs: dict[int, Output] = {}
        bar = tqdm(total=len(jobs), desc="requests", disable=None if use_tqdm else True)
        with bar, self._aborted_on_error(jobs), deferred() as interrupt:
            for job in jobs:
                self._start(job)
            while len(outputs) < len(jobs):
                for output in self._advance(owner):
                    if output["finished"]:  # one with stop strings has news before
                        outputs[output["request_id"]] = output
                        bar.update()
                interrupt.raise_if_pressed()
        return [outputs[job.request.request_id] for job in jobs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one prompt piece by piece. Closing the iterator aborts the request."""
        owner = object()
        job = self._job(prompt, _or_default(params), owner, is_live=True)
        return self._pieces(job)

    def _pieces(self, job: _Job) -> Iterator[str]:
        with self._aborted_on_error([job]):
            self._start(job)
            is_finished = False
            while not is_finished:
                for output in self._advance(job.owner):
                    is_finished = output["finished"]
                    if output["new_text"]:
                        yield output["new_text"]

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt for `step`; returns its request_id. A bad prompt is a ValueError."""
        job = self._job(prompt, _or_default(params), owner=None, is_live=True)
        self._start(job)
        return job.request.request_id

    def step(self) -> list[Output]:
        """Compute one step; returns an output for each request of `add_request` with news.

        An output has request_id, new_text, new_token_ids and finished; the last one of a request
        has what `generate` returns as well. The tokens are those of the step before: the device is
        one step ahead.
        """
        return self._advance(None)

    def abort(self, request_id: int) -> bool:
        """End a request early; its last output says "abort". False if there is none to end."""
        core, job = self._require_core(), self._jobs.get(request_id)
        if job is None or job.request.state is RequestState.FINISHED:
            return False
        with self._undisturbed():
            core.finish(job.request, "abort")
            self._end_text(job)
        return True

    def is_finished(self) -> bool:
        """Every request of `add_request` has ended and its last output was returned."""
        self._require_core()
        return not any(job.owner is None for job in self._jobs.values())

    def chat_prompt(self, message: str) -> list[int]:
        """Token ids of a user's message in the model's chat template, ready for `generate`."""
        return chat_token_ids(message, self.tokenizer)

    def stats(self) -> dict[str, object]:
        """What the engine has done since it began and where it stands, as a plain dict.

        Counts: num_prefill_launches, num_prefill_tokens, num_decode_launches, num_decode_tokens,
        num_cached_tokens, num_preemptions, finished (by reason), num_graphs, capture_ms and
        graph_bytes of these (0 on a CPU).
        Device time: prefill_busy_ms, decode_busy_ms; active_ms, for how long there were requests;
        prefill_utilisation, decode_utilisation, shares of it.
        Latencies, {p50, p90, p99}: queue_ms, ttft_ms, tpot_ms, latency_ms of ended requests, itl_ms
        of tokens.
        Now: num_waiting, num_running; num_kv_blocks, num_free_kv_blocks of the pool that decode
        reads, num_prefill_kv_blocks, num_free_prefill_kv_blocks of that which prompts are computed
        in, the same one on one device.
        handoff: None on one device, else a dict of num_handoffs, num_bytes, copy_ms, gb_s,
        exposed_ms (percentiles; from a prompt's first token being known to its first decode step
        being possible, as far as the copy alone was waited for), mode (kv_handoff), way ("kernel" |
        "copy_engine" | "staged"), link_gb_s (measured at the start), num_in_flight (copies),
        num_prefilled (computed, and not on their way yet), num_copying, num_decoding, backlog (see
        max_decode_backlog), peak_backlog and credits (free decode blocks that no request was
        promised).
        """
        return self._require_core().statistics()

    @property
    def decode_runner(self) -> DecodeWorker | DecodePipeline:
        """What launches decode steps; with enable_decode_pipeline a DecodePipeline, which has
        get_pipeline_statistics() and print_pipeline_statistics()."""
        return self._require_core().decode

    def print_statistics(self) -> None:
        """Print what `stats` gives, in lines to be read."""
        print(as_text(self.stats()))

    def _require_core(self) -> Core | PDCore:
        if self._core is None:
            raise RuntimeError("this LLM was closed by exit(); make a new one")
        return self._core

    def _job(self, prompt: Prompt, params: SamplingParams, owner: object, *, is_live: bool) -> _Job:
        """Check a prompt and its params; nothing is queued yet."""
        core = self._require_core()
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop must be empty for a checkpoint without tokenizer files")
        token_ids = encode_prompt(prompt, self.tokenizer, self.model_config.vocab_size)
        request = Request(
            request_id=next(self._ids),
            token_ids=token_ids,
            params=params,
            seed=self._seeds.getrandbits(63),
        )
        core.scheduler.check(request)
        is_text = isinstance(prompt, str)
        detokenizer = Detokenizer(self.tokenizer, params.stop, token_ids, is_text=is_text)
        return _Job(request, owner, detokenizer, is_live or bool(params.stop))

    def _start(self, job: _Job) -> None:
        job.request.arrival_time = time.perf_counter()  # a stream waits for its first reader
        self._require_core().scheduler.add(job.request)
        self._jobs[job.request.request_id] = job

    def _advance(self, owner: object) -> list[Output]:
        """One step; returns what is new for this owner and keeps what is new for others."""
        core = self._require_core()
        with deferred(), self._undisturbed():
            try:
                ended = core.step(self._on_token)
            except BaseException:
                self._end_texts(core.take_ended())
                raise
            self._end_texts(ended)
        touched = self._touched.pop(owner, {})
        for request_id, job in touched.items():
            if job.request.state is RequestState.FINISHED:
                del self._jobs[request_id]
        return [job.output() for job in touched.values()]

    def _on_token(self, request: Request, token_id: int) -> FinishReason | None:
        job = self._jobs[request.request_id]
        if not job.is_live:
            return None
        self._touch(job)  # first: should the detokenizer fail, its owner must hear of the end
        job.new_token_ids.append(token_id)
        job.new_text.append(job.detokenizer.push(token_id))
        return "stop" if job.detokenizer.stopped is not None else None

    def _end_texts(self, requests: Sequence[Request]) -> None:
        """Of all, even where one's detokenizer fails, which is raised then."""
        errors = []
        for request in requests:
            try:
                self._end_text(self._jobs[request.request_id])
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _end_text(self, job: _Job) -> None:
        self._touch(job)  # first: should the detokenizer fail, its owner must hear of the end
        unread: list[int] = []
        if not job.is_live:
            job.new_token_ids = unread = job.request.generated_token_ids
        job.new_text.append(job.detokenizer.finish(*unread))

    def _drop(self, job: _Job) -> None:
        """Forget a request, if it was queued at all, of which nobody wants to hear: no text."""
        is_queued = self._jobs.pop(job.request.request_id, None) is not None
        if is_queued and job.request.state is not RequestState.FINISHED:
            self._require_core().finish(job.request, "abort")

    def _touch(self, job: _Job) -> None:
        self._touched.setdefault(job.owner, {})[job.request.request_id] = job

    @contextmanager
    def _aborted_on_error(self, jobs: Sequence[_Job]) -> Iterator[None]:
        """Abort the call's requests if it ends early: by an exception, or a closed iterator."""
        try:
            yield
        except BaseException:
            with deferred():
                self._drop_all(jobs)
            raise

    def _drop_all(self, jobs: Sequence[_Job]) -> None:
        """Forget the requests of one call. Where no other is left, nobody may step any more: copies
        of theirs that are in flight are waited for, or they would keep their blocks."""
        if self._is_busy:
            self._given_up.append(jobs)
            return
        with self._undisturbed():
            self._touched.pop(jobs[0].owner if jobs else None, None)
            if self._core is None:
                return
            for job in jobs:
                self._drop(job)
            if self._core.is_idle:
                self._core.drain()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Within, requests may be in the middle of anything: those of streams that garbage
        collection closes meanwhile are forgotten behind it."""
        was_busy, self._is_busy = self._is_busy, True
        try:
            yield
        finally:
            self._is_busy = was_busy
            while self._given_up and not was_busy:
                self._drop_all(self._given_up.pop())


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, str) or (
        isinstance(prompts, Sequence)
        and len(prompts)
        and not isinstance(prompts[0], str | Sequence)
    ):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be text, token ids or a list of them, got {prompts!r}")
    return list(prompts)


def _as_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    if isinstance(params, Sequence):
        if len(params) != num_prompts:
            raise ValueError(f"params must be one or {num_prompts}, got {len(params)}")
        return list(params)
    return [_or_default(params)] * num_prompts


def _or_default(params: Any) -> Any:
    return SamplingParams() if params is None else params
