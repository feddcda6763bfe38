"""What a decode pipeline needs of the machine, seen to before CUDA starts or weights are loaded."""

import os

import torch

from engine.config import EngineConfig

# Streams beyond so many share a hardware queue, in which they take turns: with the 8 that CUDA has
# by itself, the two of a partition may. The driver reads it when it starts, and takes up to 32.
CONNECTIONS, NUM_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS", "32"


def ask_for_connections(config: EngineConfig) -> None:
    """Have CUDA start with a queue for each stream, if it has not started and the user has not
    said otherwise, and green contexts may be made."""
    may_be_green = config.has_decode_pipeline and not config.disable_green
    # set later it would have no effect, and hide that
    if may_be_green and config.device != "cpu" and not torch.cuda.is_initialized():
        os.environ.setdefault(CONNECTIONS, NUM_CONNECTIONS)


def max_connections() -> str:
    """What CUDA was started with, as far as the environment tells; "unset": its own default."""
    return os.environ.get(CONNECTIONS, "unset")


def check_stage_sms(config: EngineConfig, device: str) -> None:
    """Refuse a static split of more SMs than the decode device has: ValueError, whether or not
    green contexts are made. A CPU has none to compare with."""
    if not config.has_static_pipeline or not device.startswith("cuda"):
        return
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    attention, ffn = config.decode_attention_sm, config.decode_ffn_sm
    if attention + ffn > num_sms:
        raise ValueError(
            f"decode_attention_sm + decode_ffn_sm must add up to at most the device's {num_sms} "
            f"SMs, got {attention} + {ffn} = {attention + ffn}"
        )
