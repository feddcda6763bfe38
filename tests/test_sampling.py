"""Token ids from logits: greedy, the kept tokens, their shares, and what a row may depend on."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference, sampling
from tests.strategies import DEVICE, dtypes, ints, randn, seeds, strided

INF = float("inf")


@dataclass(frozen=True)
class Row:
    """How one row is sampled."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    step: int = 0


def tensors(rows: list[Row]) -> tuple[Tensor, ...]:
    """The arguments of `sample` behind the logits."""
    return (
        ints([row.temperature for row in rows], torch.float32),
        ints([row.top_k for row in rows], torch.int32),
        ints([row.top_p for row in rows], torch.float32),
        ints([row.min_p for row in rows], torch.float32),
        ints([row.seed for row in rows], torch.int64),
        ints([row.step for row in rows], torch.int32),
    )


rows = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.1, 0.6, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**31 - 1),
)
vocab_sizes = st.integers(1, 300) | st.sampled_from([4095, 4096, 4097, 9001])


def draw_logits(kind: str, seed: int, num_rows: int, V: int, dtype: torch.dtype) -> Tensor:
    (logits,) = randn(seed, (num_rows, V), dtype=torch.float32)
    if kind == "spread":
        logits = logits * 8
    elif kind == "ties":
        logits = (logits * 2).round()
    elif kind == "equal":
        logits = torch.full_like(logits, float(logits[0, 0]) if num_rows else 0.0)
    elif kind == "masked":  # by a grammar, say: all but a few tokens are forbidden
        logits = logits.masked_fill(logits < 1, -INF)
        logits[:, seed % V] = 0
    elif kind == "extreme":
        low = max(-1e30, torch.finfo(dtype).min)
        logits = torch.where(logits < 0, low, logits * (torch.finfo(dtype).max / 64))
    return logits.to(dtype)


# examples of tests that the interpreter makes slow
FEW = settings.default.max_examples if DEVICE == "cuda" else 6
SOME = settings.default.max_examples if DEVICE == "cuda" else 18
DRAWS = 4 if DEVICE == "cuda" else 2  # what such tests make fewer of
# of rows alike: the two whose numbers, 0.96 and 0.98, show where low logits are missing
SEEDS = (0, 1, 2, 3, 7, 10) if DEVICE == "cuda" else (7, 10)
kinds = st.sampled_from(["plain", "spread", "ties", "equal", "masked", "extreme"])


# Share of the mass that fp32 may misplace: a weight's exponent of up to 17 (weights under 2**-24
# do not count) is off by 17 * 2**-24, a sum of 2**12 weights by less than its depth, 12 * 2**-24.
SLACK = 1e-5


def assert_sampled(tokens: Tensor, logits: Tensor, params: tuple[Tensor, ...]) -> None:
    """Each token is where the CDF of the kept tokens passes the row's uniform number.

    What is kept within SLACK of top_p and min_p may be decided otherwise; the CDF then moves by the
    mass that is in doubt.
    """
    temperature, top_k, top_p, min_p, row_seeds, steps = params
    assert tokens.dtype == torch.int64 and tokens.shape == temperature.shape
    greedy = temperature <= 0
    clean = logits.double().nan_to_num(-INF, torch.finfo(torch.float32).max, -INF)
    assert torch.equal(tokens[greedy], clean[greedy].argmax(-1))
    scaled = clean / torch.where(greedy, 1.0, temperature)[:, None]
    plain = ((top_k <= 0) & (top_p >= 1) & (min_p <= 0))[:, None]
    less_p = torch.where(top_p < 1, top_p.double() - SLACK, 1.0)
    kept = plain | reference._kept_tokens(
        scaled, top_k, top_p.double() + SLACK, min_p * (1 - SLACK)
    )
    surely = reference._kept_tokens(scaled, top_k, less_p, (min_p * (1 + SLACK)).clamp_max(1))
    weights = torch.softmax(scaled.masked_fill(~kept, -INF), dim=-1)
    in_doubt = weights.masked_fill(plain | surely, 0).sum(-1)
    after = weights.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    weight = weights.gather(1, tokens[:, None])[:, 0]
    assert (greedy | (weight > 0)).all(), "a token that is not kept"
    share = reference.uniform(row_seeds, steps)
    slack = SLACK + 2 * in_doubt
    assert (greedy | ((share >= after - weight - slack) & (share <= after + slack))).all()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 tokens, 32 candidates to a row: every way of the search, at small V."""
    small = {
        "PIECE_V": 64,
        "GROUP": 8,
        "MAX_CANDIDATES": 32,
        "WORD": 4,
        "WORDS_AT_ONCE": 8,
        "LISTED_AT_ONCE": 4,
        "FEW_HELD": 4,
        "MANY_HELD": 16,
        "LANES": 8,
        "SCAN_TILE": 64,
        "MASS_TILE": 256,
    }
    for name, value in small.items():
        monkeypatch.setattr(sampling, name, value)


@settings(max_examples=SOME)
@given(
    batch=st.lists(rows, max_size=4),
    V=vocab_sizes,
    kind=kinds,
    spread=st.booleans(),
    give_out=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example([], 17, "plain", False, False, torch.float32, 0)
@example([Row(0.0)], 1, "plain", False, True, torch.float16, 0)
@example([Row(0.0), Row(0.0, top_k=2, top_p=0.5)], 4097, "ties", True, True, torch.float16, 0)
@example([Row(1.0), Row(0.5, top_k=3)], 4096, "masked", False, False, torch.float32, 0)
@example([Row(1.0, min_p=1.0), Row(1.0, top_p=1e-6)], 300, "ties", False, False, torch.float32, 0)
@example([Row(1.0), Row(1.0, 2, 0.5, 0.1)], 8, "equal", False, False, torch.float32, 0)
@example([Row(0.1), Row(0.1, 5, 0.9, 0.1)], 300, "extreme", False, False, torch.float32, 0)
def test_sample_matches_reference(batch, V, kind, spread, give_out, dtype, seed):
    logits = draw_logits(kind, seed, len(batch), V, dtype)
    logits, params = strided(logits) if spread else logits, tensors(batch)
    out = torch.full((len(batch),), -1, device=DEVICE) if give_out else None
    tokens = kernels.sample(logits, *params, out=out)
    assert out is None or tokens is out
    assert_sampled(tokens, logits, params)
    if give_out or DEVICE == "cuda":  # the interpreter runs programs in order, and finds little
        assert torch.equal(kernels.sample(logits, *params), tokens)


@settings(max_examples=SOME, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(rows, min_size=1, max_size=3),
    V=st.integers(1, 300),
    kind=kinds,
    dtype=dtypes,
    seed=seeds,
)
@example([Row(1.0, top_p=0.5), Row(1.0, top_k=200)], 300, "plain", torch.float32, 0)
@example([Row(3.0, top_p=0.5, min_p=0.9), Row(1.0, 50, 0.9, 0.02)], 300, "ties", torch.float16, 0)
def test_sample_of_many_pieces(small_pieces, batch, V, kind, dtype, seed):
    logits, params = draw_logits(kind, seed, len(batch), V, dtype), tensors(batch)
    assert_sampled(kernels.sample(logits, *params), logits, params)


def misleading_row() -> Tensor:
    """Three groups of a high logit and seven that its mass in the index hides: with the high ones
    alone the index says that enough is found. Forty groups of one that is lower, and nothing."""
    weights = torch.full((3000,), 1e-9)
    weights[800:824], weights[800:824:8] = 0.02, 1.0
    weights[1000:1320:8] = 0.0045
    return weights.log().to(DEVICE)


@pytest.mark.parametrize("room", [32, 128])
@pytest.mark.parametrize("top_p", [0.84, 0.9, 0.97])
def test_top_p_where_the_index_misleads(small_pieces, monkeypatch, room, top_p):
    """The value that it suggests is too high: a lower one is found, or the row is searched."""
    monkeypatch.setattr(sampling, "MAX_CANDIDATES", room)
    logits = misleading_row().expand(len(SEEDS), -1).contiguous()
    params = tensors([Row(top_p=top_p, seed=n) for n in SEEDS])
    assert_sampled(kernels.sample(logits, *params), logits, params)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("top_p", [0.95, 0.99999])
@pytest.mark.parametrize("V", [300, 3000])
def test_mass_far_below_what_every_group_reaches_is_found(V, top_p, temperature):
    """Flat rows: the index has nothing to say of logits in groups that all reach a value."""
    logits = draw_logits("spread", 0, len(SEEDS), V, torch.float32)
    params = tensors([Row(temperature, top_p=top_p, seed=n) for n in SEEDS])
    assert_sampled(kernels.sample(logits, *params), logits, params)


@pytest.mark.parametrize("num_equal", [1, 31, 32, 33, 300])
@pytest.mark.parametrize(
    "row", [Row(top_k=1), Row(top_k=40), Row(top_p=0.5), Row(min_p=1.0), Row(top_k=2, top_p=0.9)]
)
def test_ties_around_what_the_list_holds(small_pieces, num_equal, row):
    """Equal logits are kept together, fewer or more than there is room for (32)."""
    logits = torch.arange(300, device=DEVICE).float().div(600).repeat(3, 1)
    logits[:, torch.randperm(300, generator=torch.Generator().manual_seed(0))[:num_equal]] = 4.0
    params = tensors([replace(row, seed=n) for n in range(3)])
    assert_sampled(kernels.sample(logits, *params), logits, params)


@pytest.mark.parametrize("V", [1, 63, 64, 65, 128, 299])
def test_rows_of_every_kind_in_one_batch(small_pieces, V):
    """With limits and without, whatever piece the vocabulary ends in; nothing behind it is read."""
    kinds_of_row = [Row(0.0), Row(0.7), Row(top_k=3), Row(top_p=0.6), Row(0.7, min_p=0.2)]
    batch = [replace(row, seed=n) for n in range(2) for row in (*kinds_of_row, Row(1.0, 9, 0.8))]
    logits, params = strided(draw_logits("spread", V, len(batch), V, torch.float16)), tensors(batch)
    assert_sampled(kernels.sample(logits, *params), logits, params)


@given(batch=st.lists(rows, min_size=1, max_size=4), V=vocab_sizes, dtype=dtypes, seed=seeds)
def test_reference_holds_to_the_same_rules(batch, V, dtype, seed):
    logits, params = draw_logits("plain", seed, len(batch), V, dtype), tensors(batch)
    assert_sampled(reference.sample(logits, *params), logits, params)


@given(V=vocab_sizes, kind=kinds, dtype=dtypes, seed=seeds)
def test_greedy_takes_the_first_of_equals(V, kind, dtype, seed):
    logits, params = draw_logits(kind, seed, 3, V, dtype), tensors([Row(0.0)] * 3)
    assert torch.equal(kernels.sample(logits, *params), logits.float().argmax(-1))


@settings(max_examples=FEW)
@given(batch=st.lists(rows, min_size=2, max_size=3), V=vocab_sizes, dtype=dtypes, seed=seeds)
def test_a_token_does_not_depend_on_the_other_rows(batch, V, dtype, seed):
    logits, params = draw_logits("plain", seed, len(batch), V, dtype), tensors(batch)
    together = kernels.sample(logits, *params)
    for b in range(len(batch)):
        alone = kernels.sample(logits[b : b + 1], *(param[b : b + 1] for param in params))
        assert torch.equal(alone, together[b : b + 1])


def test_seed_and_step_each_change_the_draw():
    logits = torch.zeros(64, 5000, device=DEVICE)
    by_step = kernels.sample(logits, *tensors([Row(step=n) for n in range(64)]))
    by_seed = kernels.sample(logits, *tensors([Row(seed=n << 32) for n in range(64)]))  # high word
    assert len(set(by_step.tolist())) > 60 and len(set(by_seed.tolist())) > 60


@settings(max_examples=FEW)
@given(
    batches=st.lists(st.lists(rows, min_size=1, max_size=3), min_size=2, max_size=3),
    V=vocab_sizes,
    dtype=dtypes,
    seed=seeds,
)
def test_workspace_is_reused_from_batch_to_batch(batches, V, dtype, seed):
    workspace = kernels.sample_workspace(3, V, DEVICE)
    for nth, batch in enumerate(batches):
        logits, params = draw_logits("spread", seed + nth, len(batch), V, dtype), tensors(batch)
        tokens = kernels.sample(logits, *params, workspace=workspace)
        assert torch.equal(tokens, kernels.sample(logits, *params))
        for field in fields(workspace):  # nothing in it may be carried over
            scratch = getattr(workspace, field.name)
            scratch.fill_(INF if scratch.is_floating_point() else -1)


@settings(max_examples=SOME)
@given(batch=st.lists(rows, min_size=3, max_size=3), V=st.integers(1, 300), dtype=dtypes)
@example([Row(0.0), Row(1.0), Row(1.0, 2, 0.5, 0.1)], 300, torch.float16)
def test_rows_that_are_no_numbers_still_name_a_token(batch, V, dtype):
    """Where fp16 overflows there are infinities and, behind them, NaNs."""
    logits = draw_logits("plain", 0, 3, V, dtype)
    logits[0] = float("nan")
    logits[1, ::2], logits[1, 1::2] = float("nan"), -INF
    logits[2, V // 2] = INF  # all the mass there is
    tokens = kernels.sample(logits, *tensors(batch)).tolist()
    assert 0 <= tokens[0] < V and 0 <= tokens[1] < V and tokens[2] == V // 2


@pytest.mark.parametrize("nothing", [-INF, float("nan")])
def test_a_row_of_nothing_gives_the_first_token(small_pieces, nothing):
    """Whatever limits it, and in however many pieces."""
    kinds_of_row = [Row(0.0), Row(0.7), Row(top_k=50), Row(top_p=0.6), Row(0.7, min_p=0.1)]
    batch = [replace(row, seed=n) for n in range(4) for row in kinds_of_row]
    logits, params = torch.full((len(batch), 300), nothing, device=DEVICE), tensors(batch)
    for implementation in (kernels.sample, reference.sample):
        assert implementation(logits, *params).tolist() == [0] * len(batch)


def test_a_forbidden_token_is_never_drawn():
    """-inf stays out however hot the row, and a row of -inf alone still names a token."""
    num_each = 25 * DRAWS
    logits = torch.full((2 * num_each, 40), -INF, device=DEVICE)
    logits[:num_each, [7, 39]] = torch.tensor([-1e30, -1e30], device=DEVICE)
    tokens = kernels.sample(logits, *tensors([Row(3.0, seed=n) for n in range(2 * num_each)]))
    assert set(tokens[:num_each].tolist()) <= {7, 39}
    assert set(tokens[num_each:].tolist()) == {0}


def test_the_ends_of_the_interval_draw_kept_tokens(monkeypatch):
    """Seeds whose number is within 2**-12 of 0 or 1, where only rounding is left of the CDF."""
    row_seeds = torch.arange(40_000)
    share = reference.uniform(row_seeds, torch.zeros_like(row_seeds))
    ends = row_seeds[(share < 2**-12) | (share > 1 - 2**-12)].tolist()
    assert len(ends) > 5
    logits = torch.full((len(ends), 300), -INF, device=DEVICE)
    logits[:, [5, 6, 7, 200]] = torch.tensor([-60.0, 3.0, 3.0, -60.0], device=DEVICE)
    for row in (Row(1.0), Row(1.0, top_k=2), Row(1.0, top_p=0.9)):
        batch = [replace(row, seed=seed) for seed in ends]
        assert set(kernels.sample(logits, *tensors(batch)).tolist()) == {6, 7}


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    wanted = probs * len(tokens)
    counts = torch.bincount(tokens.cpu(), minlength=len(probs))
    return float(((counts - wanted).square() / wanted).sum())


# chance of a sound sampler to exceed it: 1e-4, at 7 degrees of freedom; the seeds are fixed
CRITICAL = 29.9


def test_tokens_are_drawn_in_their_proportions():
    num_draws, temperature = 1000, 0.7
    logits = 2 * randn(1, (8,), dtype=torch.float32)[0]
    batch = [Row(temperature, seed=n // 4, step=n % 4) for n in range(num_draws)]
    tokens = kernels.sample(logits.expand(num_draws, 8).contiguous(), *tensors(batch))
    assert chi_square(tokens, (logits / temperature).softmax(-1).cpu()) < CRITICAL
    # the test has the power to tell a temperature of 1.0 from one of 0.7
    assert chi_square(tokens, logits.softmax(-1).cpu()) > CRITICAL


def test_limited_tokens_are_drawn_in_their_proportions(small_pieces):
    """Over many pieces; the kept are renormalised."""
    num_draws, V = 140, 256
    logits = randn(1, (V,), dtype=torch.float32)[0]
    logits[::32] = logits[::32] * 1.5 + 10  # the top-k, in four pieces
    logits = logits.half()
    batch = [Row(1.0, top_k=8, seed=n) for n in range(num_draws)]
    tokens = kernels.sample(logits.expand(num_draws, V).contiguous(), *tensors(batch))
    assert (tokens % 32 == 0).all()
    assert chi_square(tokens // 32, logits[::32].float().softmax(-1).cpu()) < CRITICAL
    assert chi_square(tokens // 32, torch.full((8,), 1 / 8)) > CRITICAL


@pytest.mark.parametrize(
    "row, kept",
    [(Row(top_k=3), {5, 6, 7}), (Row(top_p=0.8), {5, 6, 7}), (Row(min_p=0.3), {6, 7})],
)
def test_every_kept_token_is_drawn_and_no_other(row, kept):
    probs = torch.tensor([0.02, 0.03, 0.05, 0.05, 0.05, 0.1, 0.3, 0.4])
    num_draws = 10 * DRAWS
    logits = probs.log().to(DEVICE, torch.float16).expand(num_draws, 8).contiguous()
    tokens = kernels.sample(logits, *tensors([replace(row, seed=n) for n in range(num_draws)]))
    assert set(tokens.tolist()) == kept


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [49152, 151936])
def test_sample_at_model_shapes(V, dtype):
    logits = draw_logits("spread", 0, 64, V, dtype)
    batch = [
        Row(0.6 if n % 4 else 0.0, (0, 20, 0)[n % 3], (1.0, 0.95)[n % 2], 0.0, n, 7 * n)
        for n in range(64)
    ]
    params = tensors(batch)
    assert_sampled(kernels.sample(logits, *params), logits, params)
