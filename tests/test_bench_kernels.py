"""The kernel benchmark: what a case builds, what it counts, what it refuses, what a row holds."""

import csv
import inspect
from dataclasses import asdict, replace

import pytest
import torch

import kernels
from experiments import attention_cases, attention_peers, bench_kernels, ceilings, peers, readings
from experiments.attention_cases import DecodeAttention, PrefillAttention
from experiments.bench_kernels import all_cases, measure, table_rows
from experiments.copy_cases import CopyBlocks, CopyBlocksToPeer
from experiments.dense_cases import Linear, Mlp
from experiments.kernel_case import Impl, Mismatch, Problem, row_error, share_unequal
from experiments.memory_cases import (
    AddRmsNorm,
    RmsNorm,
    RopeStore,
    Sampling,
)
from experiments.places import Place
from experiments.readings import COLUMNS, Ceilings, Reading, best_peers
from experiments.timing import Effort, Times, _time_launches, copies_for, time_calls
from kernels import reference
from tests.event_clock import clocked
from tests.strategies import DEVICE, bits, randn

WHERE = torch.device(DEVICE)
SMALL_HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SMALL_BLOCK = {"num_kv_heads": 1, "head_dim": 16}
BRIEF = Effort(graph_ms=0.1, reading_ms=1.0, min_replays=2, max_replays=2)

# every builder, with its bytes and flops computed by hand (two bytes an element)
SMALL = [
    (DecodeAttention(context_lens=(40, 17), **SMALL_HEADS), 2 * 57 * 2 * 16 * 2, 4 * 4 * 16 * 57),
    (
        PrefillAttention(context_lens=(3, 20), **SMALL_HEADS),
        2 * 23 * 4 * 16 * 2 + 2 * 23 * 2 * 16 * 2,
        4 * 4 * 16 * (6 + 210),
    ),
    (
        Mlp(model="tiny", num_tokens=3, hidden=64, intermediate=96),
        (3 * 64 * 96 + 2 * 3 * 64) * 2,
        3 * 2 * 3 * 64 * 96,
    ),
    (Linear(name="tiny", num_tokens=3, width=48, depth=64), 6816, 18432),
    (Linear(name="tiny", num_tokens=3, width=48, depth=64, has_norm=True), 6816, 18432),
    (Linear(name="tiny", num_tokens=3, width=48, depth=64, has_residual=True), 7104, 18432),
    (RmsNorm(num_tokens=3, hidden=64), (3 + 3 + 1) * 64 * 2, 0),
    (AddRmsNorm(num_tokens=3, hidden=64), (4 * 3 + 1) * 64 * 2, 0),
    (RopeStore(num_tokens=19, **SMALL_HEADS), 2 * 19 * (4 + 2 + 2) * 16 * 2, 0),
    (Sampling(num_rows=2, vocab_size=300), 1200, 0),
    (Sampling(num_rows=2, vocab_size=300, temperature=0.6), 1200, 0),
    (Sampling(num_rows=2, vocab_size=300, temperature=0.6, top_k=5, top_p=0.9), 1200, 0),
    (CopyBlocks(num_blocks=3, num_layers=2, **SMALL_BLOCK), 2 * 3 * 2 * 2 * 16 * 16 * 2, 0),
    (CopyBlocks(num_blocks=3, num_layers=0, **SMALL_BLOCK), 2 * 3 * 2 * 16 * 16 * 2, 0),
    (CopyBlocksToPeer(num_blocks=3, num_layers=2, **SMALL_BLOCK), 3 * 2 * 2 * 16 * 16 * 2, 0),
]
SMALL_CASES = [replace(case, dtype=torch.float16) for case, _, _ in SMALL]


def name_of(value: object) -> str | None:
    return f"{value.kernel} {value.shape}" if isinstance(value, bench_kernels.Case) else None


@pytest.mark.parametrize(("case", "num_bytes", "flops"), SMALL, ids=name_of)
def test_counts_are_those_done_by_hand(case, num_bytes, flops):
    assert (case.bytes, case.flops) == (num_bytes, flops)
    in_fp32 = replace(case, dtype=torch.float32)
    assert (in_fp32.bytes, in_fp32.flops) == (2 * num_bytes, flops)


@pytest.mark.parametrize("case", SMALL_CASES, ids=name_of)
def test_every_impl_passes_its_check_on_every_copy(case):
    if not case.is_possible(WHERE):
        pytest.skip("needs a second GPU")
    problem = case.build(WHERE, 2)
    on_two = [Place("grid", 2, 2)]
    impls = problem.impls(on_two, on_two)
    assert [impl.place.num_sms for impl in impls if impl.name == "ours"] == [None, 2]
    told = problem.told_peers(2)
    assert len(impls) == 2 + 2 * len(problem.peers) + len(told)
    for impl in impls[: len(impls) - len(told)]:  # those need cuBLAS
        problem.check(impl)
        impl.run(1)


@pytest.mark.parametrize("case", SMALL_CASES, ids=name_of)
def test_a_kernel_that_does_nothing_fails_its_check(case):
    if not case.is_possible(WHERE):
        pytest.skip("needs a second GPU")
    problem = case.build(WHERE, 2)
    ours = problem.impls(())[0]
    problem.check(ours)  # its result lies in the outputs now, and must not pass for another's
    with pytest.raises(
        Mismatch, match=r"idle on 3 SMs \(grid\) must be within .* of the reference, got"
    ):
        problem.check(Impl(name="idle", run=lambda i: None, place=Place("grid", 3, 3)))


WITH_OUTPUTS_OF_EACH_COPY = (PrefillAttention, RmsNorm, RopeStore, CopyBlocks)


@pytest.mark.parametrize(
    "case", [c for c in SMALL_CASES if isinstance(c, WITH_OUTPUTS_OF_EACH_COPY)], ids=name_of
)
def test_a_call_leaves_the_other_copies_alone(case):
    """Else a graph over rotated buffers would work on fewer bytes than it counts."""
    if not case.is_possible(WHERE):
        pytest.skip("needs a second GPU")
    problem = case.build(WHERE, 2)
    ours = problem.impls(())[0]
    problem.check(ours)
    before = [bits(x).clone() for x in problem.results()]
    ours.run(1)
    assert all(torch.equal(bits(x), b) for x, b in zip(problem.results(), before, strict=True))


def test_a_failing_check_names_the_case_and_stops_the_run(monkeypatch):
    monkeypatch.setattr(kernels, "rms_norm", lambda x, weight, eps, out: out.copy_(x))
    case = RmsNorm(num_tokens=3, hidden=64, dtype=torch.float16)
    with pytest.raises(Mismatch, match="rms_norm T=3 N=64: ours must be within"):
        list(measure(case, WHERE, (), BRIEF))


def test_a_peer_that_takes_no_such_shape_is_skipped_by_name(monkeypatch, capsys):
    def refuse(i: int) -> None:
        raise RuntimeError("No available kernel.\nand more")

    impls = [Impl(name="fussy", run=refuse)]
    monkeypatch.setattr(peers, "rms_norm_peers", lambda *args: impls)
    case = RmsNorm(num_tokens=3, hidden=64, dtype=torch.float16)
    assert [r.impl for r in measure(case, WHERE, (), BRIEF)] == ["ours"]
    assert (
        "skipped fussy: T=3 N=64: RuntimeError: No available kernel.\n" in capsys.readouterr().out
    )


def test_a_wrong_peer_is_not_skipped(monkeypatch):
    impls = [Impl(name="wrong", run=lambda i: torch.zeros(3, 64, device=WHERE))]
    monkeypatch.setattr(peers, "rms_norm_peers", lambda *args: impls)
    case = RmsNorm(num_tokens=3, hidden=64, dtype=torch.float16)
    with pytest.raises(Mismatch, match="wrong must be within"):
        list(measure(case, WHERE, (), BRIEF))


def test_an_absent_package_is_named_once(capsys):
    peers.optional.cache_clear()
    assert peers.optional("no_such_package") is None is peers.optional("no_such_package")
    assert capsys.readouterr().out.count("skipped no_such_package: ModuleNotFoundError") == 1


def test_the_list_holds_the_shapes_that_are_published():
    by_name = {(case.kernel, case.shape): case for case in all_cases()}
    assert len(by_name) == len(all_cases()), "two cases of one name"
    # sizes of shared tables: KV bytes of 64 x 4096, MLP weights of Qwen3-0.6B and 8B
    heads = "H_KV=8 D=128 block=16"
    decode = by_name["decode_attention", f"B=64 context=4096 H=16 {heads}"]
    assert decode.bytes == 1_073_741_824 and decode.copies == 2 and decode.sweep
    assert by_name["decode_attention", f"B=1 context=4096 H=32 {heads}"].copies == 18
    prefill = by_name["prefill_attention", f"B=1 tokens=8192 H=32 {heads}"]
    assert prefill.flops == 4 * 32 * 128 * 8192 * 8193 // 2
    small = by_name["mlp", "Qwen3-0.6B M=1 N=1024 I=3072"]
    assert small.bytes == 18_874_368 + 2 * 1024 * 2 and small.copies == 16
    large = by_name["mlp", "Qwen3-8B M=8192 N=4096 I=12288"]
    assert large.bytes == 301_989_888 + 2 * 8192 * 4096 * 2 and large.copies == 2
    sampling = by_name["sample", "B=256 V=151936 greedy"]
    assert sampling.bytes == 77_791_232
    slab = by_name["copy_blocks", f"blocks=256 L=28 {heads}"]
    assert slab.moved_bytes == 256 * 28 * 65536


def test_a_skewed_batch_has_an_even_one_of_as_many_bytes():
    decode = [c for c in all_cases() if isinstance(c, DecodeAttention)]
    for skewed in [c for c in decode if max(c.context_lens) > 2 * min(c.context_lens)]:
        even = [c for c in decode if c is not skewed and c.bytes == skewed.bytes]
        assert even and max(even[0].context_lens) - min(even[0].context_lens) <= 1
        assert even[0].num_heads == skewed.num_heads and len(even[0].context_lens) == 64


def test_every_case_names_a_launcher_a_ceiling_and_is_a_quick_one_for_each_kernel():
    for case in all_cases():
        launcher = getattr(kernels, case.kernel.partition(" ")[0])
        assert not case.sweep or "num_sms" in inspect.signature(launcher).parameters
        assert case.kernel in readings.BANDWIDTH
        assert case.dtype == torch.bfloat16 and case.copies >= 2
    assert {c.kernel for c in all_cases() if c.quick} == set(readings.BANDWIDTH)


def test_blocks_are_scattered_and_belong_to_one_request():
    draw = attention_cases.Draw(torch.device("cpu"), torch.float16)
    case = DecodeAttention(context_lens=(33, 1, 16), **SMALL_HEADS)
    pool, table = case.pool(draw, 3)
    assert pool.shape == (5 + 7, 3, 2, 16, 2, 16) and table.shape == (3, 3)
    held = table[0, :3].tolist() + table[1, :1].tolist() + table[2, :1].tolist()
    assert len(set(held)) == 5 and held != sorted(held)
    assert set(table[1, 1:].tolist()).isdisjoint(held)


def test_prefill_is_checked_in_pieces_as_in_one(monkeypatch):
    case = PrefillAttention(context_lens=(5, 21), dtype=torch.float32, **SMALL_HEADS)
    draw = attention_cases.Draw(torch.device("cpu"), torch.float32)
    pool, table = case.pool(draw, 1)
    q = draw.randn(26, 4, 16)
    cu_seqlens, lens = torch.tensor([0, 5, 26]), torch.tensor([5, 21])
    whole = reference.prefill_attention(q, pool[:, 0], table, cu_seqlens, lens, 21, 0.25)
    monkeypatch.setattr(attention_cases, "REFERENCE_QUERIES", 8)
    torch.testing.assert_close(case.expected(q, pool[:, 0], table, 0.25), whole)


def test_contiguous_peers_attend_to_the_same_tokens(monkeypatch):
    """The grouping of query heads and the copies of the cache, on a backend of every machine."""
    math = {"math": torch.nn.attention.SDPBackend.MATH}
    monkeypatch.setattr(attention_peers, "BACKENDS", math)
    monkeypatch.setattr(attention_peers, "optional", lambda name: None)
    monkeypatch.setattr(attention_peers, "decode_peers", attention_peers._decode_sdpa)
    monkeypatch.setattr(attention_peers, "prefill_peers", attention_peers._prefill_sdpa)
    for case in (
        DecodeAttention(context_lens=(37, 37), **SMALL_HEADS),
        PrefillAttention(context_lens=(37, 37), **SMALL_HEADS),
    ):
        problem = replace(case, dtype=torch.float32).build(WHERE, 2)
        (peer,) = problem.peers
        problem.check(peer)
        peer.run(1)
    assert not DecodeAttention(context_lens=(3, 4), **SMALL_HEADS).build(WHERE, 1).peers


def test_page_lists_name_each_request_pages():
    table = torch.tensor([[4, 2, 9], [7, 9, 9], [1, 3, 9]], dtype=torch.int32)
    paged = attention_peers.Paged(torch.empty(10, 1, 2, 16, 1, 8), table, (32, 1, 17), 1)
    starts, indices, last = paged.page_lists()
    assert starts.tolist() == [0, 2, 3, 5] and indices.tolist() == [4, 2, 7, 1, 3]
    assert last.tolist() == [16, 1, 1]
    assert {x.dtype for x in (starts, indices, last)} == {torch.int32}


def test_silu_mul_is_the_formula():
    (x,) = randn(0, (3, 2 * 1500), dtype=torch.float16)
    out = torch.empty(3, 1500, dtype=torch.float16, device=DEVICE)
    peers.silu_mul(x, out)
    gate, up = x.float().chunk(2, dim=-1)
    assert row_error(out, (torch.nn.functional.silu(gate) * up).half()) < 2.0**-10
    with pytest.raises(ValueError, match=r"x must be \[3, 3000\], got \[3, 1500\]"):
        peers.silu_mul(out, out)


def test_the_worst_row_decides():
    want = torch.ones(2, 8)
    want[1] *= 1e-3
    got = want.clone()
    assert row_error(got, want) == 0.0
    got[1, 0] = 3e-3  # lost in the norm of all; 2 / sqrt(8) of its row's
    assert row_error(got, want) == pytest.approx(2 / 8**0.5)
    got[0, 0] = float("nan")
    assert not row_error(got, want) <= 1.0
    assert row_error(torch.zeros(1, 4), torch.zeros(1, 4)) == 0.0
    assert share_unequal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.25


def test_nan_fails_a_check():
    nan = torch.full((2, 2), float("nan"))
    problem = Problem(
        ours=lambda i, n: None,
        expected=lambda: (torch.ones(2, 2),),
        results=lambda: (nan,),
        outputs=(),
        error=row_error,
        bound=1e9,
    )
    with pytest.raises(Mismatch):
        problem.check(problem.impls(())[0])


def test_rotated_buffers_exceed_l2():
    l2_bytes = 60_000_000
    for num_bytes in (1, 10_000_000, 77_791_232, 2_000_000_000):
        copies = copies_for(num_bytes)
        assert 2 <= copies <= 64
        assert copies * num_bytes >= 5 * l2_bytes or copies == 64
    assert copies_for(0) == 64


def test_times_are_percentiles():
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.p20, times.p50, times.p80) == (2.0, 3.5, 5.0)
    with pytest.raises(ValueError, match="two times or more, got 1"):
        Times.of([1.0])


def test_every_copy_has_its_turn():
    seen: list[int] = []
    times = time_calls(seen.append, 3, torch.device("cpu"), Effort())
    assert seen == [0, 1, 2] and 0 <= times.p20 <= times.p50 <= times.p80


def test_launches_are_timed_once_clocks_have_settled(monkeypatch):
    """Two calls a round; the first rounds take three times as long, 20 ms in all."""
    calls = []
    run = clocked(monkeypatch, lambda i: calls.append(i) or (3.0 if i < 6 else 1.0))
    settled = _time_launches(run, 2, Effort(min_replays=3, settle_ms=20.0))
    assert (settled.p20, settled.p80) == (1.0, 1.0) and len(calls) == 2 * (4 + 3)
    calls.clear()
    run = clocked(monkeypatch, lambda i: calls.append(i) or (3.0 if i < 6 else 1.0))
    at_once = _time_launches(run, 2, Effort(min_replays=3))
    assert (at_once.p50, at_once.p80) == (3.0, 3.0) and len(calls) == 2 * (1 + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_a_graph_of_calls_takes_as_long_as_they_do(captured):
    x = torch.ones(1 << 26, device=DEVICE)
    y = torch.empty_like(x)
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run(i: int) -> None:
        y.copy_(x)
        counter.add_(1)

    times = time_calls(run, 2, torch.device(DEVICE, 0), BRIEF, captured=captured)
    assert 0.05 < times.p50 < 5.0 and times.p20 <= times.p50 <= times.p80
    assert counter.item() > 2


@pytest.mark.parametrize("num_programs", [None, 1, 3, 99])
def test_the_read_stream_reads_every_word_once(num_programs):
    (x,) = randn(1, (6 * 1024,), dtype=torch.float32)
    words = x.view(torch.int32)
    out = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    ceilings.read_stream(words, out, 1024, 4, num_programs=num_programs)
    low32 = int(words.long().sum()) & 0xFFFFFFFF
    assert int(out.long().sum()) & 0xFFFFFFFF == low32


def test_the_read_stream_refuses_what_it_would_not_read():
    x, out = torch.zeros(1025, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="x must be int32 in tiles of 1024, under"):
        ceilings.read_stream(x, out, 1024, 4)
    with pytest.raises(ValueError, match="x must be int32"):
        ceilings.read_stream(x[:1024].float(), out, 1024, 4)
    with pytest.raises(ValueError, match="out must hold 4 sums, got 2"):
        ceilings.read_stream(x[:1024], out, 256, 4)


def small_ceilings(*args, **options):
    sizes = {"stream_bytes": 1 << 18, "matmul_size": 64}
    return ceilings.measure_ceilings(*args, **options, **sizes)


def test_ceilings_are_measured_and_counted():
    rows = list(small_ceilings(WHERE, torch.float16, (2, 9999), BRIEF))
    found = [(r.impl, r.sms_asked) for r in rows if r.impl != "peer copy"]
    expected = [("read stream", None), ("read stream", 2), ("copy", None), ("matmul", None)]
    assert found == expected, "9999 SMs are more than there are"
    by_name = {r.impl: r for r in rows}
    assert by_name["read stream"].bytes == 1 << 18
    assert by_name["copy"].bytes in (2 << 18, (2 << 18) * 7 // 16)  # whichever was the faster
    assert by_name["matmul"].flops == 2 * 64**3
    limits = Ceilings.of(rows)
    assert limits.tflop_s > 0 and min(limits.gb_s.values()) > 0


def reading(kernel="mlp", impl="ours", ms=1.0, **values) -> Reading:
    """1 GB and 1 TFLOP, unless told."""
    row = {
        "shape": "s",
        "dtype": "bfloat16",
        "partitioning": "none",
        "sms_asked": None,
        "sms_granted": 132,
        "bytes": 10**9,
        "flops": 10**12,
        "date": "2026-01-01 10:00",
        "gpu": "H100",
        "commit": "abc",
    }
    times = {"ms_p20": ms * 0.9, "ms_p50": ms, "ms_p80": ms * 1.1}
    return Reading(kernel=kernel, impl=impl, **row | times | values)


LIMITS = [
    reading("ceiling", "read stream", ms=0.4, flops=0),  # 2500 GB/s
    reading("ceiling", "copy", ms=0.5, flops=0),  # 2000 GB/s
    reading("ceiling", "peer copy", ms=2.5, flops=0),  # 400 GB/s
    reading("ceiling", "matmul", ms=1.25),  # 800 TFLOP/s
]


def test_percent_is_of_what_binds():
    limits = Ceilings.of(LIMITS)
    assert limits.tflop_s == pytest.approx(800)
    computes = reading("mlp", ms=2.5)
    assert limits.is_compute_bound(computes) and limits.percent(computes) == pytest.approx(50)
    reads = reading("decode_attention", ms=0.5, flops=10**9)
    assert reads.gb_s == pytest.approx(2000) and limits.percent(reads) == pytest.approx(80)
    copies = reading("rms_norm", ms=1.0, flops=0)
    assert limits.percent(copies) == pytest.approx(50)
    crosses = reading("copy_blocks to peer", ms=5.0, flops=0)
    assert limits.percent(crosses) == pytest.approx(50)
    # at the ridge both take 0.4 ms
    ridge = 800e12 * 0.4e-3
    assert not limits.is_compute_bound(reading(flops=int(ridge * 0.99)))
    assert limits.is_compute_bound(reading(flops=int(ridge * 1.01)))


def test_a_run_without_a_ceiling_is_an_error():
    with pytest.raises(ValueError, match=r"ceilings, got none for \['copy', 'matmul'\]"):
        Ceilings.of(LIMITS[:1])
    with pytest.raises(ValueError, match="must hold the ceiling 'peer copy'"):
        Ceilings.of([r for r in LIMITS if r.impl != "peer copy"]).bandwidth("copy_blocks to peer")


def test_the_table_shows_ours_beside_the_best_peer():
    grid = {"partitioning": "grid", "sms_asked": 56}
    green = {"partitioning": "green", "sms_asked": 56, "sms_granted": 56}
    rows = [
        *LIMITS,
        reading(ms=2.0),
        reading(ms=4.0, **grid),
        reading(ms=5.0, **green),
        reading(impl="slow", ms=5.0),
        reading(impl="fast", ms=1.6),
        reading(impl="slow", ms=6.0, **green),
        reading("rms_norm", flops=0, shape="alone"),
    ]
    assert best_peers(rows)[rows[4].where].ms_p50 == 1.6
    table = table_rows(rows)
    assert [row["kernel"] for row in table[:4]] == ["read stream", "copy", "peer copy", "matmul"]
    assert table[3]["rate"] == "800 TFLOP/s" and table[0]["rate"] == "2500 GB/s"
    mlp, on_56, confined, norm = table[4:]
    assert (mlp["us"], mlp["rate"], mlp["% of ceiling"]) == ("2000.0", "500 TFLOP/s", "62.5")
    assert (mlp["x best peer"], mlp["best peer"]) == ("0.80", "fast")
    assert (on_56["SMs"], on_56["% of ceiling"]) == ("56 grid", "31.2")
    assert on_56["best peer"] == "", "a partition beside the whole GPU says nothing"
    assert (confined["SMs"], confined["x best peer"]) == ("56 green", "1.20")
    assert confined["best peer"] == "slow"
    assert (norm["rate"], norm["best peer"]) == ("1000 GB/s", "")


def test_the_columns_are_these():
    assert COLUMNS == [
        "kernel", "impl", "shape", "dtype", "partitioning", "sms_asked", "sms_granted", "ms_p20",
        "ms_p50", "ms_p80", "bytes", "flops", "date", "gpu", "torch", "triton", "driver", "commit",
    ]  # fmt: skip
    assert list(asdict(reading())) == COLUMNS


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    """The command on small cases, wherever it runs."""
    cases = [
        DecodeAttention(context_lens=(40, 17), sweep=(2,), quick=True, **SMALL_HEADS),
        RmsNorm(num_tokens=3, hidden=64),
    ]
    monkeypatch.setattr(bench_kernels, "all_cases", lambda: cases)
    monkeypatch.setattr(bench_kernels, "measure_ceilings", small_ceilings)
    monkeypatch.setattr(bench_kernels, "Effort", lambda: BRIEF)
    monkeypatch.setattr("experiments.timing.ROTATED_BYTES", 1)
    out = tmp_path / "kernels.csv"

    def run(*argv: str) -> list[dict[str, str]]:
        bench_kernels.main([*argv, "--device", DEVICE, "--out", str(out)])
        return list(csv.DictReader(out.open()))

    return run


def test_the_command_writes_a_row_for_each_reading(rehearsal, capsys, tmp_path):
    rows = rehearsal("--num-sms", "2", "3")
    assert list(rows[0]) == COLUMNS
    where = ("kernel", "partitioning", "sms_asked")
    ours = [tuple(r[name] for name in where) for r in rows if r["impl"] == "ours"]
    grids = [("decode_attention", "grid", sms) for sms in ("2", "3")]
    assert [row for row in ours if row[1] != "green"] == [
        ("decode_attention", "none", ""),
        *grids,
        ("rms_norm", "none", ""),
    ]
    assert {r["gpu"] for r in rows} and {r["commit"] for r in rows} != {""}
    assert len({r["date"] for r in rows}) == 1, "one stamp for a run"
    for r in rows:
        assert 0 < float(r["ms_p20"]) <= float(r["ms_p50"]) <= float(r["ms_p80"])
    parsed = readings.read_csv(tmp_path / "kernels.csv")
    assert len(parsed) == len(rows) and Ceilings.of(parsed).tflop_s > 0
    text = capsys.readouterr().out
    assert "% of ceiling" in text and " seconds, compilation and checks included; " in text
    if DEVICE == "cpu":
        assert "skipped green contexts: device must be a GPU of this machine, got cpu" in text


def test_only_and_quick_choose_cases(rehearsal):
    kernels_of = [r["kernel"] for r in rehearsal("--only", "rms_norm", "--num-sms")]
    assert set(kernels_of) == {"ceiling", "rms_norm"}
    more = rehearsal("--quick", "--num-sms")[len(kernels_of) :]
    assert {r["kernel"] for r in more} == {"ceiling", "decode_attention"}


def test_a_machine_without_a_peer_skips_those_cases(rehearsal, monkeypatch, capsys):
    case = CopyBlocksToPeer(num_blocks=3, num_layers=0, **SMALL_BLOCK)
    monkeypatch.setattr(bench_kernels, "all_cases", lambda: [case])
    monkeypatch.setattr("experiments.ceilings.peer_device", lambda device: None)
    monkeypatch.setattr("experiments.copy_cases.peer_device", lambda device: None)
    assert {r["kernel"] for r in rehearsal("--num-sms")} == {"ceiling"}
    assert "skipped copy_blocks to peer: blocks=3 one layer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="device must have a peer"):
        case.build(WHERE, 1)


def test_help_says_what_can_be_asked(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_kernels.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in ("--only", "--quick", "--out", "--device", "--num-sms"))
    assert all(kernel in text for kernel in readings.BANDWIDTH)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "gemm"], "invalid choice: 'gemm'"),
        (["--num-sms", "0", "--device", DEVICE], "--num-sms must be positive, got [0]"),
        (["--num-sms", "many"], "invalid int value"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_kernels.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_kernels.main([])
    assert "--device must be a GPU of this machine, got cuda:0" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        bench_kernels.main(["--device", "cpu"])
    assert "needs TRITON_INTERPRET=1" in capsys.readouterr().err
