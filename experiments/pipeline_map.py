"""Which cells of the pipeline's regime map a run measures, and in which order."""

import sys
from collections.abc import Sequence

import torch

from engine.kv_cache import block_bytes
from engine.step_model import Split, StepModel
from experiments.pipeline_cell import BLOCK_SIZE
from models.decoder import Decoder

CellSize = tuple[int, int]  # requests, tokens that each holds
MAP_BATCHES, MAP_CONTEXTS = (4, 16, 64, 128, 256, 512, 1024), (128, 512, 1024, 4096)
LEFT_FREE_BYTES = 4 << 30  # for graphs, buffers and compiled kernels


def whole_map() -> list[CellSize]:
    """Every cell."""
    return [(batch, context) for batch in MAP_BATCHES for context in MAP_CONTEXTS]


def most_telling_first(
    cells: Sequence[CellSize], splits: Sequence[Split], model: StepModel | None
) -> list[CellSize]:
    """By what a pipeline could win there; without a model as they are."""
    if model is None:
        return list(cells)

    def gain(cell: CellSize) -> float:
        ms = [model.pipelined_ms(*cell, split) for split in splits]
        return model.serial_ms(*cell) / min(ms, default=1.0)

    return sorted(cells, key=gain, reverse=True)


def fitting(
    cells: Sequence[CellSize], decoder: Decoder, device: torch.device
) -> tuple[list[CellSize], int]:
    """Cells whose KV blocks fit the memory that is free, and blocks for the largest of them."""
    embedding = decoder.weights.embedding
    room = sys.maxsize
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - LEFT_FREE_BYTES
    most = room // block_bytes(decoder.config, BLOCK_SIZE, embedding.dtype)
    needed = {(batch, context): batch * -(-context // BLOCK_SIZE) for batch, context in cells}
    left_out = [cell for cell in cells if needed[cell] > most]
    if left_out:
        print(f"out of memory, left out: {texts(left_out)}", file=sys.stderr)
    kept = [cell for cell in cells if needed[cell] <= most]
    return kept, max((needed[cell] for cell in kept), default=1)


def texts(cells: Sequence[CellSize]) -> str:
    """As the command line takes them."""
    return " ".join(f"{batch}x{context}" for batch, context in cells)
