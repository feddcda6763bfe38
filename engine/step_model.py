"""What a decode step takes at the least, serial and in two stages: bytes and FLOPs over the rates
of a device. Plain arithmetic: it says which splits are worth a measurement, not which is faster.

A pipelined step reads the weights once for each micro-batch. It can win only where a micro-batch is
bound by its products all the same, and the reads of the KV cache hide behind those of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

Split = tuple[int, int]  # SMs for attention, SMs for FFN

# Gain by arithmetic of which less is not worth a reading: two stages at a time slow each other. On
# an H200 no cell whose best split was promised less than 0.10 won by 1 % (pipeline.csv, f9a597c and
# 4eeac9d, all layers).
WORTH_TIMING = 0.10
MAX_CANDIDATES = 3  # splits timed for one batch
MIN_DISTANCE = 16  # SMs of attention between them


@dataclass(frozen=True)
class Rates:
    """What a device reaches, rather high for bytes and low for FLOPs: it flatters splits, so that
    hardly a winner is ruled out."""

    num_sms: int
    bytes_per_ms: float  # read from memory
    flops_per_ms: float  # of products, by all SMs
    sm_bytes_per_ms: float  # that one SM reads


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """The step of one model on one device, cut into so many micro-batches."""

    rates: Rates
    num_micro_batches: int
    itemsize: int  # bytes of a weight
    kv_token_bytes: int  # of the KV cache, all layers
    attention_bytes: int  # weights that the attention stages read, all layers
    ffn_bytes: int  # weights of the FFN stages
    head_bytes: int  # of the LM head, which stands behind the stages

    def serial_ms(self, batch: int, context: int) -> float:
        """Attention and products one after the other, each on all SMs."""
        reads_ms = batch * context * self.kv_token_bytes / self.rates.bytes_per_ms
        products_ms = self._products_ms(self.attention_bytes + self.ffn_bytes, batch)
        return reads_ms + products_ms + self._head_ms(batch)

    def pipelined_ms(self, batch: int, context: int, split: Split) -> float:
        """The longest of: all that is read, the attention stages, the FFN stages."""
        rates, num = self.rates, self.num_micro_batches
        kv_bytes = batch * context * self.kv_token_bytes
        reads_ms = (kv_bytes + num * (self.attention_bytes + self.ffn_bytes)) / rates.bytes_per_ms
        attention_rate = min(rates.bytes_per_ms, split[0] * rates.sm_bytes_per_ms)
        attention_ms = kv_bytes / attention_rate
        attention_ms += num * self._products_ms(self.attention_bytes, batch / num, split[0])
        ffn_ms = num * self._products_ms(self.ffn_bytes, batch / num, split[1])
        return max(reads_ms, attention_ms, ffn_ms) + self._head_ms(batch)

    def is_compute_bound(self, batch: int) -> bool:
        """Whether a micro-batch's products take longer than reading their weights does."""
        num_bytes = self.attention_bytes + self.ffn_bytes
        products_ms = self._flops(num_bytes, batch) / self.rates.flops_per_ms
        return products_ms > self.num_micro_batches * num_bytes / self.rates.bytes_per_ms

    def gain(self, batch: int, context: int, split: Split) -> float:
        """How many times as fast as serial the split may be."""
        return self.serial_ms(batch, context) / self.pipelined_ms(batch, context, split)

    def could_win(self, batch: int, context: int, split: Split) -> bool:
        """Whether the split may win by what is worth a reading."""
        return self.gain(batch, context, split) >= 1 + WORTH_TIMING

    def candidates(
        self, batch: int, contexts: Sequence[int], splits: Sequence[Split]
    ) -> tuple[Split, ...]:
        """Few of the splits, the most promising first, that could win at one of these contexts and
        are not alike. None where micro-batches of such a batch are bound by reading weights."""
        if not self.is_compute_bound(batch):
            return ()
        gains = {
            split: max(self.gain(batch, context, split) for context in contexts)
            for split in splits
            if any(self.could_win(batch, context, split) for context in contexts)
        }
        found: list[Split] = []
        # among equals the most SMs for FFN: products slow down beside reads, reads do not
        for split in sorted(gains, key=lambda split: (-gains[split], -split[1], split)):
            if all(abs(split[0] - other[0]) >= MIN_DISTANCE for other in found):
                found.append(split)
        return tuple(found[:MAX_CANDIDATES])

    def worth_timing(
        self, batch: int, contexts: Sequence[int], splits: Sequence[Split]
    ) -> dict[int, list[Split]]:
        """The candidates by context, each where it could win. Where another split could and none of
        them, the one that comes closest: it is there for the sake of other contexts, and the
        arithmetic is not so good that few SMs more or less would tell."""
        candidates = self.candidates(batch, contexts, splits)
        found = {}
        for context in contexts:
            could = partial(self.could_win, batch, context)
            found[context] = list(filter(could, candidates))
            if candidates and not found[context] and any(map(could, splits)):
                gain = partial(self.gain, batch, context)
                found[context] = [max(candidates, key=gain)]
        return found

    def _products_ms(self, num_bytes: int, batch: float, num_sms: int | None = None) -> float:
        rates = self.rates
        share = 1.0 if num_sms is None else num_sms / rates.num_sms
        flops_ms = self._flops(num_bytes, batch) / (rates.flops_per_ms * share)
        return max(num_bytes / rates.bytes_per_ms, flops_ms)

    def _head_ms(self, batch: int) -> float:
        return self._products_ms(self.head_bytes, batch)

    def _flops(self, num_bytes: int, batch: float) -> float:
        return 2 * batch * num_bytes / self.itemsize
