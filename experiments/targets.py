"""What kernels and engine are to reach; writes it beside what they do: results/kernels.md.

    python -m experiments.targets [--csv .../kernels.csv] [--engine-csv .../engine.csv] [--out ...]

A kernel's figure is a ratio to a ceiling or a peer of the same run on the same GPU, or a rate. The
page has a section for each GPU of kernels.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.engine_csv import read_engine_csv
from experiments.harness import RESULTS
from experiments.readings import read_csv
from experiments.target import EngineTarget, Target
from experiments.targets_page import page

# shape, least share of the read stream or 0, published microseconds of FlashInfer's best kernel
DECODE = (
    ("B=1 context=4096", 0, 13.2),
    ("B=8 context=2048", 0, 31.4),
    ("B=32 context=1024", 0, 53.1),
    ("B=64 context=4096", 92, 361.0),
    ("B=256 context=1024", 92, 363.0),
)
SKEWED = (
    ("B=64 context=1x32768+63x256", "B=64 context=764"),
    ("B=64 context=uniform(1,8192)", "B=64 context=42x4228+22x4227"),
)
MODELS = ("Qwen3-0.6B", "Qwen3-8B")
ENGINE = (
    EngineTarget("Qwen3-0.6B", "offline", 20_000, 16_700),
    EngineTarget("Qwen3-0.6B", "batch1", 1_200, 455),
    EngineTarget("Qwen3-0.6B", "fixed", 25_000, 21_700),
    EngineTarget("Qwen3-8B", "offline", 8_200, 7_660),
    EngineTarget("Qwen3-8B", "batch1", 180, 145),
    EngineTarget("Qwen3-8B", "fixed", 6_900, 6_400),
)


def targets() -> list[Target]:
    """Of the kernels, in the order of the table."""
    return attention_targets() + mlp_targets() + memory_targets()


def attention_targets() -> list[Target]:
    """Decode on the whole GPU and on partitions, uneven batches, prefill."""
    decode = {"kernel": "decode_attention"}
    found = [Target(**decode, shape=s, measure="share", want=w) for s, w, _ in DECODE if w]
    for shape, _, us in DECODE:
        aim = {"shape": shape, "want": 1.0}
        found += [
            Target(**decode, **aim, measure="peer", beside="flashinfer"),
            Target(**decode, **aim, measure="published", published_us=us),
            Target(**decode, **aim, measure="peer", is_beyond=True),
        ]
    found += [
        Target(
            **decode,
            shape=shape,
            measure="whole",
            want=want,
            is_beyond=num_sms == 48,
            num_sms=num_sms,
            partitioning=partitioning,
        )
        for shape, share, _ in DECODE
        if share
        for partitioning in ("grid", "green")
        for num_sms, want in ((56, 85), (72, 95), (48, 95))
    ]
    found += [
        Target(**decode, shape=s, measure="even", want=0.9, beside=even) for s, even in SKEWED
    ]
    found += [
        Target(kernel="prefill_attention", shape=s, measure="rate", want=w, is_beyond=beyond)
        for s, want, more in (("B=1 tokens=8192", 450, 509), ("B=4 tokens=2048", 380, 421))
        for w, beyond in ((want, False), (more, True))
    ]
    return found + [
        Target(kernel="prefill_attention", shape=s, measure="peer", want=1.0, is_beyond=True)
        for s in ("B=1 tokens=8192", "B=4 tokens=2048", "B=16 tokens=512")
    ]


def mlp_targets() -> list[Target]:
    """Decode batches, tall ones, and both sides on the same green context."""
    small, large = (1, 4, 16, 32, 64), (128, 256, 512, 1024, 2048, 4096, 8192)
    chain = {"kernel": "mlp", "measure": "peer", "beside": "cublas chain"}
    found = [Target(kernel="mlp", shape=f"Qwen3-8B M={M}", measure="share", want=85) for M in small]
    found += [
        Target(**chain, shape=f"{model} M={M}", want=want)
        for model in MODELS
        for sizes, want in ((small, 1.15), (large, 0.97))
        for M in sizes
    ]
    return found + [
        Target(**chain, shape=f"{model} M={M}", want=1.1, num_sms=n, partitioning="green")
        for model in MODELS
        for n in (64, 96)
        for M in (128, 256, 512, 1024)
    ]


def memory_targets() -> list[Target]:
    """Where the data exceeds L2, a vocabulary, and blocks beside one copy of as many bytes."""
    found = [
        Target(kernel=kernel, shape=f"T=8192 {more}", measure="share", want=85)
        for kernel, sizes in (
            ("add_rms_norm", ("N=1024", "N=4096")),
            ("rope_store", ("H=16", "H=32")),
        )
        for more in sizes
    ]
    found += [
        Target(kernel="sample", shape=f"B=256 V=151936 {how}", measure="reads", want=1.5)
        for how in (
            "greedy",
            "temperature=0.6",
            "temperature=0.6 top_k=50",
            "temperature=0.6 top_p=0.95",
        )
    ]
    return found + [
        Target(kernel=kernel, shape=shape, measure="peer", want=0.92, beside="bulk copy")
        for kernel in ("copy_blocks", "copy_blocks to peer")
        for shape in ("blocks=256 L=28", "blocks=1024 one layer")
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--csv", type=Path, default=RESULTS / "kernels.csv")
    p.add_argument("--engine-csv", type=Path, default=RESULTS / "engine.csv")
    p.add_argument("--out", type=Path, default=RESULTS / "kernels.md")
    args = p.parse_args(argv)
    engine_readings = read_engine_csv(args.engine_csv) if args.engine_csv.exists() else []
    args.out.write_text(page(read_csv(args.csv), targets(), ENGINE, engine_readings))


if __name__ == "__main__":
    main()
