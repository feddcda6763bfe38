"""What a core is built from: kernels, a decoder and KV blocks, as an EngineConfig asks for them."""

import math
import warnings
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine.auto_pipeline import AutoPipeline
from engine.calibration_file import CalibrationFile, digest_of_sources
from engine.closing import closed_on_error
from engine.config import EngineConfig
from engine.decode import DecodeWorker
from engine.device_rates import rates_of, step_model
from engine.graphs import GraphPool
from engine.kv_cache import KVCache, num_blocks_that_fit
from engine.micro_batches import num_rows
from engine.pipeline import DecodePipeline
from engine.pipeline_needs import max_connections
from engine.stage_schedule import Placement
from engine.stage_streams import GpuStreams, InOrder, StageStreams, in_a_line
from green.driver import load_driver
from green.partition import legal_splits
from models.config import ModelConfig
from models.decoder import Decoder, StageBuffers
from models.fetch import cache_folder
from models.weights import dummy_weights, load_weights


def ops_of(kernels: str) -> ModuleType:
    """The namespace that the decoder runs on; Triton is imported only where it is used."""
    if kernels == "triton":
        import kernels as triton_kernels

        return triton_kernels
    from kernels import reference

    return reference


def longest_request(config: EngineConfig, model_config: ModelConfig) -> int:
    """Tokens of the longest request; ValueError where model or cache cannot hold what is asked."""
    if config.num_kv_blocks is not None and config.num_kv_blocks * config.block_size < 2:
        raise ValueError(f"num_kv_blocks must hold 2 tokens or more, got {config.num_kv_blocks}")
    longest = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValueError(
            f"max_model_len must be at most the model's {longest}, got {config.max_model_len}"
        )
    return config.max_model_len or longest


def make_decoder(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path,
    device: torch.device,
    model_len: int,
) -> Decoder:
    """Load the weights, or make dummy ones. model_len: tokens of the longest request."""
    dtype = getattr(torch, config.resolve_dtype(model_config.dtype, str(device)))
    options = {"device": device, "dtype": dtype}
    if config.load_format == "dummy":
        weights = dummy_weights(model_config, **options, seed=config.seed)
    else:
        weights = load_weights(model_config, folder, **options, progress=True)
    ops = ops_of(config.resolve_kernels(str(device)))
    return Decoder(model_config, weights, model_len, ops)


def num_kv_blocks(config: EngineConfig, decoder: Decoder) -> int:
    """As many as are asked for, or as fit on the decoder's device beside what is there.

    Raises ValueError where not even one fits.
    """
    embedding = decoder.weights.embedding
    return config.num_kv_blocks or num_blocks_that_fit(
        decoder.config,
        config.block_size,
        device=embedding.device,
        dtype=embedding.dtype,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )


def num_prefill_blocks(config: EngineConfig, decoder: Decoder, num_needed: int) -> int:
    """The share of them that prefill_kv_fraction says, or num_needed where that is more; never
    more than fit."""
    num_blocks = num_kv_blocks(config, decoder)
    num_wanted = max(num_needed, math.ceil(num_blocks * config.prefill_kv_fraction))
    return num_wanted if config.num_kv_blocks else min(num_wanted, num_blocks)


def make_cache(config: EngineConfig, decoder: Decoder, num_blocks: int) -> KVCache:
    """KV blocks of the decoder's dtype, on its device."""
    embedding = decoder.weights.embedding
    options = {"device": embedding.device, "dtype": embedding.dtype}
    return KVCache(decoder.config, num_blocks, config.block_size, **options)


def graph_pool(config: EngineConfig, device: torch.device) -> GraphPool | None:
    """Where the graphs of one stream allocate; None where steps are not captured."""
    # the references look at values on the host, which a capture does not allow
    has_graphs = device.type == "cuda" and config.resolve_kernels(str(device)) == "triton"
    return torch.cuda.graph_pool_handle() if has_graphs and not config.enforce_eager else None


def decode_buffers(config: EngineConfig, decoder: Decoder) -> StageBuffers:
    """For as many requests as may run, whichever way a step is cut."""
    rows = config.max_num_seqs
    if config.has_decode_pipeline:
        rows = num_rows(rows, config.decode_micro_batches)
    return decoder.buffers(rows, rows, block_size=config.block_size)


def make_decode_worker(
    config: EngineConfig,
    decoder: Decoder,
    kv_cache: KVCache,
    buffers: StageBuffers,
    *,
    max_model_len: int,
    pool: GraphPool | None,
    device: torch.device,
) -> DecodeWorker:
    """A DecodePipeline where one is asked for, serial and warning where it has no partition."""
    options: dict[str, Any] = {
        "decoder": decoder,
        "kv_cache": kv_cache,
        "buffers": buffers,
        "max_model_len": max_model_len,
        "graph_pool": pool,
        "device": device,
        "max_num_seqs": config.max_num_seqs,
    }
    if not config.has_decode_pipeline:
        return DecodeWorker(**options)
    options |= {
        "num_micro_batches": config.decode_micro_batches,
        "min_requests": config.pipeline_min_requests,
        "is_timed": config.decode_pipeline_profiling,
    }
    make = _static_pipeline if config.has_static_pipeline else _auto_pipeline
    worker = make(config, options)
    if device.type == "cuda":
        worker.statistics.max_connections = max_connections()
    return worker


def _static_pipeline(config: EngineConfig, options: dict[str, Any]) -> DecodePipeline:
    """One on the partition that is asked for, serial where that cannot be had."""
    streams, why_none = _stage_streams(config, options["device"])
    found = [] if streams is None else [streams]
    with closed_on_error(*found):
        worker = DecodePipeline(**options, streams=found)
    worker.statistics.why_none = why_none
    worker.statistics.asked_sms = (config.decode_attention_sm, config.decode_ffn_sm)
    return worker


def _auto_pipeline(config: EngineConfig, options: dict[str, Any]) -> DecodePipeline:
    """One that times itself, or a serial one that says why there is nothing to time."""
    device, decoder = options["device"], options["decoder"]
    why_none = _why_not_auto(config, options)
    if why_none is None:
        try:
            rates = rates_of(device)
            model = step_model(
                decoder.config,
                decoder.weights.embedding.element_size(),
                rates,
                config.decode_micro_batches,
                Placement(),
            )
            capability = torch.cuda.get_device_capability(device)
            splits = [s for s in legal_splits(rates.num_sms, capability) if sum(s) == rates.num_sms]
            return AutoPipeline(
                **options,
                model=model,
                splits=splits,
                make_streams=partial(GpuStreams.partitioned, device=device),
                file=CalibrationFile(cache_folder() / "decode_pipeline", _setting(config, options)),
            )
        except Exception as error:  # of the driver or torch: serial works anyway
            why_none = in_a_line(error)
    worker = DecodePipeline(**options, streams=[])
    worker.statistics.why_none = why_none
    return worker


def _why_not_auto(config: EngineConfig, options: dict[str, Any]) -> str | None:
    """What rules a pipeline out before anything is timed."""
    if config.disable_green:
        return "disable_green is set"
    if options["device"].type != "cuda":
        return "auto: a CPU has no SMs to divide"
    if options["graph_pool"] is None:
        return "auto: without CUDA graphs there is nothing to compare"
    if options["decoder"].weights.embedding.element_size() != 2:
        return "auto: products of other than 16-bit dtypes are not known well enough"
    return None


def _setting(config: EngineConfig, options: dict[str, Any]) -> dict[str, Any]:
    """What times of a decode step depend on, as far as the engine is told: of a GPU whose power
    limit has changed it is not."""
    device, decoder = options["device"], options["decoder"]
    shape = asdict(decoder.config)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": load_driver().call("cuDriverGetVersion"),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "sources": digest_of_sources(),
        "model": {name: value for name, value in shape.items() if isinstance(value, int)},
        "dtype": str(decoder.weights.embedding.dtype),
        "load_format": config.load_format,  # values too: what they are changes what a step takes
        "max_num_seqs": options["max_num_seqs"],  # which rows a micro-batch of a batch has
        "block_size": config.block_size,
        "max_model_len": options["max_model_len"],
        "num_micro_batches": config.decode_micro_batches,
        "profiling": config.decode_pipeline_profiling,
    }


def _stage_streams(
    config: EngineConfig, device: torch.device
) -> tuple[StageStreams | None, str | None]:
    """The partition that is asked for, or None and why there is none; on a CPU, and with the
    references, a stand-in."""
    if device.type != "cuda" or config.resolve_kernels(str(device)) != "triton":
        return InOrder(), None
    if config.disable_green:
        return None, "disable_green is set"
    try:
        asked = (config.decode_attention_sm, config.decode_ffn_sm)
        return GpuStreams.partitioned(asked, device), None
    except Exception as error:  # of the driver, torch, Triton or its compiler: serial works anyway
        why_none = in_a_line(error)
        warnings.warn(f"decode is serial, not pipelined: {why_none}", stacklevel=2)
        return None, why_none
