"""What a GPU reads and computes in a millisecond, by its clocks, and the model's step on it."""

import torch

from engine.stage_schedule import Placement
from engine.step_model import Rates, StepModel
from green.driver import GreenContextUnsupported, load_driver
from models.config import ModelConfig

# dense products of 16-bit numbers, per SM and clock, by major compute capability
FLOPS_A_CLOCK = {8: 2048, 9: 4096}
# shares of what the clocks allow, as read off an H100: streams reach 0.87 and the best library
# products 0.68; see StepModel for the sides on which these err
READ_SHARE, FLOPS_SHARE = 0.9, 0.62
# Alone an SM reads 52 bytes a clock; of 24 to 52, gains by arithmetic go with those that an H200
# measured in 264 steps on splits (short readings, b6ac0d6) best at 28 to 32: correlation 0.63, at
# 52 0.17.
SM_BYTES_A_CLOCK = 32


def rates_of(device: torch.device) -> Rates:
    """Of a GPU. GreenContextError where its driver does not tell, or it is none."""
    if device.type != "cuda":
        raise GreenContextUnsupported(f"a {device.type} has no SMs to divide")
    driver = load_driver()
    ordinal = driver.call("cuDeviceGet", device.index or 0)

    def attribute(name: str) -> int:
        key = driver.enum("CUdevice_attribute", f"CU_DEVICE_ATTRIBUTE_{name}")
        return driver.call("cuDeviceGetAttribute", key, ordinal)

    properties = torch.cuda.get_device_properties(device)
    clocks_a_ms = attribute("CLOCK_RATE")  # kHz
    # both edges of the memory's clock carry a bit on each line
    bytes_a_ms = attribute("MEMORY_CLOCK_RATE") * attribute("GLOBAL_MEMORY_BUS_WIDTH") * 2 / 8
    flops_a_clock = FLOPS_A_CLOCK[min(max(properties.major, 8), 9)]
    num_sms = properties.multi_processor_count
    return Rates(
        num_sms=num_sms,
        bytes_per_ms=bytes_a_ms * READ_SHARE,
        flops_per_ms=clocks_a_ms * flops_a_clock * num_sms * FLOPS_SHARE,
        sm_bytes_per_ms=clocks_a_ms * SM_BYTES_A_CLOCK,
    )


def step_model(
    config: ModelConfig, itemsize: int, rates: Rates, num_micro_batches: int, placement: Placement
) -> StepModel:
    """The model's weights by the stage that reads them. itemsize: bytes of one."""
    heads_size = config.num_heads * config.head_dim
    num_weights = {
        "qkv": config.hidden_size * config.qkv_size,
        "o": config.hidden_size * heads_size,
        "mlp": 3 * config.hidden_size * config.intermediate_size,
    }
    by_stage = {"attention": 0, "ffn": 0}
    for operation, number in num_weights.items():
        by_stage[placement.stage_of(operation)] += number * itemsize * config.num_layers
    return StepModel(
        rates=rates,
        num_micro_batches=num_micro_batches,
        itemsize=itemsize,
        kv_token_bytes=config.kv_bytes_per_token(itemsize),
        attention_bytes=by_stage["attention"],
        ffn_bytes=by_stage["ffn"],
        head_bytes=config.hidden_size * config.vocab_size * itemsize,
    )
