"""Which row of the decode device's tables each request has, and what a step reads by row.

What stays as it is from step to step is kept in arrays and picked by row: read anew from hundreds
of requests, it costs the host a good part of the time that the device takes for the step. Knows
nothing of devices.
"""

from collections.abc import Sequence

import numpy as np

from engine.batch import SAMPLING, BlockTableOf, param_columns
from engine.request import Request


class DecodeRows:
    """Rows for as many requests as may decode; what one holds is of the request that has it."""

    def __init__(self, num_rows: int, block_size: int, max_blocks: int) -> None:
        """max_blocks: of one request."""
        self._block_size = block_size
        self._row_of: dict[int, int] = {}  # request_id -> row
        self._free = list(range(num_rows))[::-1]
        self._num_prompt_tokens = np.zeros(num_rows, np.int64)
        self._params = {n: np.zeros(num_rows, t) for n, t in SAMPLING.items() if n != "steps"}
        self._block_table = np.zeros((num_rows, max_blocks), np.int32)
        self._num_blocks = np.zeros(num_rows, np.int64)  # leading ones of a row that are known

    @property
    def num_free(self) -> int:
        """Rows that no request has."""
        return len(self._free)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._row_of

    def without_row(self, requests: Sequence[Request]) -> list[Request]:
        """Those that were not admitted, or released since."""
        return [request for request in requests if request.request_id not in self._row_of]

    def admit(self, requests: Sequence[Request]) -> np.ndarray:
        """Give each request a row: [B] int64."""
        for request in requests:
            self._row_of[request.request_id] = self._free.pop()
        rows = self.of(requests)
        self._num_blocks[rows] = 0
        self._num_prompt_tokens[rows] = [request.num_prompt_tokens for request in requests]
        for name, values in param_columns(requests).items():
            self._params[name][rows] = values
        return rows

    def release(self, request: Request) -> None:
        """Take the request's row back; harmless where it has none."""
        row = self._row_of.pop(request.request_id, None)
        if row is not None:
            self._free.append(row)

    def of(self, requests: Sequence[Request]) -> np.ndarray:
        """The requests' rows: [B] int64. KeyError where one has none."""
        row_of = self._row_of
        return np.array([row_of[request.request_id] for request in requests], np.int64)

    def learn_blocks(
        self,
        requests: Sequence[Request],
        rows: np.ndarray,
        context_lens: np.ndarray,
        table_of: BlockTableOf,
    ) -> tuple[list[int], list[int]]:
        """Note the blocks of those requests whose tokens need more than their rows have, a few in
        a step. Returns what is new: cells of the table, flat and of the device's width, and their
        blocks. rows, context_lens: [B] int64 of the requests."""
        cells: list[int] = []
        blocks: list[int] = []
        width = self._block_table.shape[1]
        for i in np.flatnonzero(context_lens > self._num_blocks[rows] * self._block_size).tolist():
            row, table = int(rows[i]), table_of(requests[i].request_id)
            known = int(self._num_blocks[row])
            self._block_table[row, known : len(table)] = table[known:]
            self._num_blocks[row] = len(table)
            cells.extend(range(row * width + known, row * width + len(table)))
            blocks.extend(table[known:])
        return cells, blocks

    def columns(self, rows: np.ndarray, context_lens: np.ndarray) -> dict[str, np.ndarray]:
        """What a step reads of its requests, by the names of `decode.STEP_FIELDS`: [B] each. rows,
        context_lens: [B] int64, their blocks known."""
        positions = context_lens - 1
        indices, offsets = np.divmod(positions, self._block_size)
        blocks = self._block_table[rows, indices].astype(np.int64)
        return {
            "rows": rows,
            "positions": positions,
            "slot_mapping": blocks * self._block_size + offsets,
            "context_lens": context_lens,
            "steps": context_lens - self._num_prompt_tokens[rows],
            **{name: values[rows] for name, values in self._params.items()},
        }
