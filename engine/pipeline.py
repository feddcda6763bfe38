"""DecodePipeline: micro-batches of a decode step in the attention and the FFN stage at once."""

from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from engine.closing import close_all
from engine.decode import STEP_FIELDS, Columns, DecodeWorker, batch_buckets
from engine.device import Span
from engine.graphs import GraphPool
from engine.kv_cache import KVCache
from engine.micro_batches import cut, places, rows_of
from engine.pipeline_stats import SERIAL, PipelineStats, StepTimes
from engine.request import Request
from engine.stage_schedule import Placement, StageLaunch, make_schedule
from engine.stage_streams import StageStreams
from engine.stage_times import TimedStreams
from models.decoder import AttentionBatch, Decoder, StageBuffers

Key = tuple[str, int, int]  # the streams' name, rows of a micro-batch, which of two timed graphs
MicroBatch = tuple[StageBuffers, AttentionBatch]


class DecodePipeline(DecodeWorker):
    """A DecodeWorker with two ways to run a step: serial, as it does itself, and pipelined.

    `modes` says which by the rows of a micro-batch: the streams, or None for serial. It may be
    changed between steps: a graph that is not there yet is captured when it is first needed. Steps
    of fewer than min_requests are serial whatever it says.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        buffers: StageBuffers,
        *,
        max_model_len: int,
        graph_pool: GraphPool | None,
        device: torch.device,
        max_num_seqs: int | None = None,
        streams: Sequence[StageStreams],
        min_requests: int,
        num_micro_batches: int = 2,
        placement: Placement | None = None,
        is_timed: bool = False,
    ) -> None:
        """buffers: for `micro_batches.num_rows` rows, of which serial steps use max_num_seqs;
        streams: the first has every step to begin with; none: all are serial; is_timed: read the
        times of stages and steps, on a GPU alone, which costs two graphs for one and events between
        their kernels.

        ValueError where there are not two micro-batches, or not as many rows for each.
        """
        super().__init__(
            decoder,
            kv_cache,
            buffers,
            max_model_len=max_model_len,
            graph_pool=graph_pool,
            device=device,
            max_num_seqs=max_num_seqs,
        )
        max_rows = len(buffers.logits)
        if num_micro_batches < 2 or max_rows < num_micro_batches or max_rows % num_micro_batches:
            raise ValueError(
                "num_micro_batches must be 2 or more and divide the rows of the buffers, "
                f"got {num_micro_batches} with {max_rows} rows"
            )
        self.num_micro_batches = num_micro_batches
        num_layers = decoder.config.num_layers
        self.schedule = make_schedule(num_layers, num_micro_batches, placement or Placement())
        self.streams = {some.name: some for some in streams}
        if len(self.streams) < len(streams):
            raise ValueError(
                f"streams must have names that differ, got {[s.name for s in streams]}"
            )
        self.sizes = batch_buckets(max_rows // num_micro_batches)  # rows of a micro-batch
        first = next(iter(streams), None)
        self.modes: dict[int, StageStreams | None] = dict.fromkeys(self.sizes, first)
        self._min_requests = min_requests
        self.statistics = PipelineStats()
        if first is not None:
            self.statistics.partitioning = first.name
            self.statistics.granted_sms = first.granted
        self._is_timed = is_timed and device.type == "cuda"
        self._timed: dict[Key, TimedStreams] = {}  # of the newest run or capture of each
        # steps whose times nobody has read, and what says that each is over: events that a graph
        # records may still tell of its replay before
        self._unread: dict[Key, torch.cuda.Event] = {}
        self._serial_spans: deque[Span] = deque()  # the same of serial steps, the oldest first
        self._turn = 0

    def warm_up(self) -> None:
        """Compile the kernels and capture the graphs that steps may come to as modes stand."""
        for num_requests in range(self.buckets[-1], 0, -1):
            for key in self._keys_of(num_requests):
                if key not in self.graphs.captured:
                    self.inputs.upload({}, self._padding)
                    is_serial = isinstance(key, int)
                    self.graphs.run(key, self._step if is_serial else self._pipelined_step)

    def _keys_of(self, num_requests: int) -> list[Key | int]:
        """The graphs of steps of so many requests."""
        keys: list[Key | int] = []
        for streams in self._modes_of(num_requests):
            if streams is None:
                keys.append(self._bucket_of(num_requests))
            else:
                size = self._size_of(num_requests)
                keys += [(streams.name, size, turn) for turn in range(1 + self._is_timed)]
        return keys

    def close(self) -> None:
        """Drop the graphs, then give the partitions back: all, whichever of them fails."""
        super().close()
        self._unread.clear()
        self._timed.clear()  # events must be gone before the streams that they were recorded on
        close_all(self.streams.values())

    def get_pipeline_statistics(self) -> dict[str, object]:
        """Steps by mode, micro-batches, SMs asked for and granted, and times by stage; see
        `PipelineStats.as_dict`."""
        for key in tuple(self._unread):
            self._read_times(key)
        self._read_serial_times()
        granted = {s.name: s.granted for s in self.streams.values() if s.granted is not None}
        self.statistics.granted_by_mode = granted
        return self.statistics.as_dict()

    def print_pipeline_statistics(self) -> None:
        """The same, on standard output."""
        self.get_pipeline_statistics()
        print(self.statistics.as_text())

    def _size_of(self, num_requests: int) -> int:
        """Rows of a micro-batch in a step of so many requests."""
        most = -(-num_requests // self.num_micro_batches)
        return next(size for size in self.sizes if size >= most)

    def _mode_of(self, num_requests: int, num_kv_tokens: int) -> StageStreams | None:
        """The streams of a step of so many requests, which hold so many tokens together; None: it
        is serial."""
        is_small = num_requests < self._min_requests
        return None if is_small else self.modes[self._size_of(num_requests)]

    def _modes_of(self, num_requests: int) -> Sequence[StageStreams | None]:
        """Those of such a step, whatever its requests hold."""
        return [self._mode_of(num_requests, 0)]

    def _run_step(self, requests: Sequence[Request], columns: Columns) -> Sequence[int]:
        streams = self._mode_of(len(requests), sum(columns["context_lens"]))
        if streams is None:
            serial_rows = super()._run_step(requests, columns)
            self.statistics.step_launched(SERIAL, self._bucket_of(len(requests)), len(requests))
            return serial_rows
        size = self._size_of(len(requests))
        micro_batches = cut(columns["context_lens"], self.num_micro_batches)
        rows = places(micro_batches, size)
        self.inputs.upload(self._placed(columns, rows), self._padding)
        self._run_pipelined((streams.name, size, self._turn))
        num_rows = size * self.num_micro_batches
        self.statistics.step_launched(streams.name, num_rows, len(requests))
        self.statistics.micro_batches_cut(micro_batches, columns["context_lens"])
        return rows

    def _placed(self, columns: Columns, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The columns with each request's value in its row, padding in the others."""
        placed = {}
        for name, values in columns.items():
            placed[name] = np.full(max(rows) + 1, self._padding.get(name, 0), STEP_FIELDS[name])
            placed[name][rows] = values
        return placed

    def _run_serial(self, size: int) -> None:
        if not self._is_timed:
            super()._run_serial(size)
            return
        self._read_serial_times()
        is_first = self.graphs.is_capturing and size not in self.graphs.captured
        span = Span(self.device)
        super()._run_serial(size)
        span.stop()
        if not is_first:  # the device waited for the host, which captured
            self._serial_spans.append(span)

    def _read_serial_times(self) -> None:
        while self._serial_spans and self._serial_spans[0].is_done:
            step_ms = self._serial_spans.popleft().ms
            self.statistics.step_timed(SERIAL, StepTimes(step_ms))

    def _run_pipelined(self, key: Key) -> None:
        if not self._is_timed:
            self.graphs.run(key, self._pipelined_step)
            return
        # The step before the last one is over, for its tokens are taken before this launch. What
        # may still run is a step of the other turn, whose graph records other events.
        self._read_times(key)
        self._turn = 1 - self._turn
        is_first = self.graphs.is_capturing and key not in self.graphs.captured
        self.graphs.run(key, self._pipelined_step)
        if not is_first:  # what was captured just now has recorded no event yet
            self._unread[key] = torch.cuda.Event(enable_timing=True)
            self._unread[key].record(torch.cuda.current_stream(self.device))

    def _read_times(self, key: Key) -> None:
        is_over = key in self._unread and self._unread[key].query()
        if is_over and (times := self._timed[key].read()):
            del self._unread[key]
            self.statistics.step_timed(key[0], times)

    def _pipelined_step(self, key: Key) -> None:
        """Embed to sampled token, in static buffers, each micro-batch in rows of its own."""
        name, size, _ = key
        streams = self.streams[name]
        if self._is_timed:
            streams = self._timed[key] = TimedStreams(streams)
        micro_batches = [
            (self.buffers.micro_batch(rows), self._attention_batch(rows))
            for rows in rows_of(size, self.num_micro_batches)
        ]
        num_rows = size * self.num_micro_batches
        for launch in self.schedule:
            num_sms = streams.num_sms(launch.stream)
            if launch.micro_batch is None:
                work = partial(self._run_main, launch, num_rows)
            else:
                micro_batch = micro_batches[launch.micro_batch]
                work = partial(self._run_stage, launch, micro_batch, num_sms)
            streams.run(launch, work)

    def _run_main(self, launch: StageLaunch, num_rows: int) -> None:
        for operation, _ in launch.operations:
            (self._begin if operation == "begin" else self._end)(num_rows)

    def _run_stage(self, launch: StageLaunch, micro_batch: MicroBatch, num_sms: int | None) -> None:
        decoder, (buffers, batch) = self.decoder, micro_batch
        for operation, layer in launch.operations:
            match operation:
                case "qkv":
                    decoder.project_qkv(layer, buffers, num_sms=num_sms)
                case "attend":
                    kv_cache = self.kv_cache.layers[layer]
                    decoder.attend(layer, buffers, batch, kv_cache, num_sms=num_sms)
                case "o":
                    decoder.project_o(layer, buffers, num_sms=num_sms)
                case "mlp":
                    decoder.mlp(layer, buffers, num_sms=num_sms)
