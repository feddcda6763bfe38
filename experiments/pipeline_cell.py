"""One cell of the pipeline's benchmark: a batch of equal requests, its steps in every mode."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from engine.kv_cache import KVCache
from engine.micro_batches import num_rows
from engine.pipeline import DecodePipeline
from engine.request import Request, SamplingParams
from engine.stage_schedule import Placement
from engine.stage_streams import InOrder, StageStreams
from experiments.energy import Sustained, sustain
from experiments.timing import Effort, Times, time_calls
from models.decoder import Decoder

BLOCK_SIZE = 16
# At its power limit a GPU takes two seconds behind a pause until its clocks are steady, and half a
# second behind steps of another mode.
BEHIND_A_PAUSE = Effort(min_replays=2, settle_ms=2000.0)
STEADY = Effort(min_replays=5, settle_ms=500.0)
AT_ONCE = Effort(min_replays=5)
READING_MS = 80.0
STEPS_ON_HOST = 8  # of a reading without a graph
NUM_TIMED_STEPS = 12
ENDS = "ends"


class Cell:
    """One batch of requests over one KV cache, and a worker for every mode of its steps."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        batch: int,
        context: int,
        modes: Sequence[StageStreams],
        num_micro_batches: int,
        placement: Placement,
    ) -> None:
        self.batch, self.context = batch, context
        rows = num_rows(batch, num_micro_batches)
        self.buffers = decoder.buffers(rows, rows, block_size=BLOCK_SIZE)
        self.tables = block_tables(kv_cache.num_blocks, batch, context)
        device = decoder.weights.embedding.device
        self._options: dict[str, Any] = {
            "decoder": decoder,
            "kv_cache": kv_cache,
            "buffers": self.buffers,
            "max_model_len": context,
            "graph_pool": torch.cuda.graph_pool_handle() if device.type == "cuda" else None,
            "device": device,
            "num_micro_batches": num_micro_batches,
            "placement": placement,
            "min_requests": 1,
        }
        self.requests = [_request(i, context) for i in range(batch)]
        self.pipeline = self._worker(modes)
        self._newest = self.pipeline.token_ids.clone()
        self._graphs: dict[StageStreams | None, torch.cuda.CUDAGraph] = {}
        self.capture_ms: defaultdict[StageStreams | None, float] = defaultdict(float)

    def _worker(self, modes: Sequence[StageStreams], **more: Any) -> DecodePipeline:
        pipeline = DecodePipeline(**self._options, streams=modes, **more)
        pipeline.admit(self.requests)
        return pipeline

    def step(self, mode: StageStreams | None) -> list[int]:
        """The same step once more, from the same tokens; None: serial. The first is captured."""
        pipeline, graphs = self.pipeline, self.pipeline.graphs
        captured, capture_ms = set(graphs.captured), graphs.capture_ms
        pipeline.modes = dict.fromkeys(pipeline.modes, mode)
        pipeline.token_ids.copy_(self._newest)
        token_ids = pipeline.launch(self.requests, self.tables.__getitem__).wait()
        for key in graphs.captured.keys() - captured:
            self._graphs[mode] = graphs.captured[key]
            self.capture_ms[mode] = graphs.capture_ms - capture_ms
        return token_ids

    def time(self, mode: StageStreams | None, effort: Effort = STEADY) -> Times:
        """Of one replay; where nothing is captured, of one step with its launches."""
        self.step(mode)  # its inputs lie where it looks for them
        graph, device = self._graphs.get(mode), self.pipeline.device

        def run(_: int) -> None:
            graph.replay() if graph else self.step(mode)

        steps = STEPS_ON_HOST
        if graph:
            step_ms = time_calls(run, 1, device, Effort(min_replays=2), captured=False).p50
            steps = max(1, round(READING_MS / step_ms))
        return time_calls(run, steps, device, effort, captured=False)

    def sustain(self, mode: StageStreams | None, step_ms: float) -> Sustained:
        """Time and energy of a step that takes about step_ms, replayed for some seconds."""
        self.step(mode)
        return sustain(self._graphs[mode].replay, step_ms, self.pipeline.device)

    def ends(self) -> Times:
        """Of a step without its layers."""
        nothing_between = InOrder()
        nothing_between.name = ENDS
        self.pipeline.streams[ENDS] = nothing_between
        schedule = self.pipeline.schedule
        self.pipeline.schedule = tuple(one for one in schedule if one.stream == "main")
        times = self.time(nothing_between, AT_ONCE)
        self.pipeline.schedule = schedule
        return times

    def stage_times(self, mode: StageStreams) -> dict[str, Any]:
        """Busy time of each stage, from a graph with events in it."""
        pipeline = self._worker([mode], is_timed=True)
        for _ in range(NUM_TIMED_STEPS):
            pipeline.launch(self.requests, self.tables.__getitem__).wait()
        stats = pipeline.get_pipeline_statistics()
        busy = stats["busy_ms"]
        return {
            "attention_ms": busy["attention"],
            "ffn_ms": busy["ffn"],
            "layers_ms": stats["layers_ms"],
            "overlap": stats["overlap"],
        }


def _request(index: int, context: int) -> Request:
    """One whose newest token is the last of its context, and whose next is being drawn."""
    token_ids = [(index * 7919 + i * 31) % 1000 for i in range(context)]
    request = Request(index, token_ids, SamplingParams(temperature=0.0))
    request.num_in_flight = 1
    return request


def block_tables(num_blocks: int, batch: int, context: int) -> list[list[int]]:
    """Scattered blocks for each request."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    each = -(-context // BLOCK_SIZE)
    return [order[i * each : (i + 1) * each] for i in range(batch)]
