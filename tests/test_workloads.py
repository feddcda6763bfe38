"""Workloads are the ones that they name: token counts, arrivals, parts."""

import statistics
from itertools import pairwise

import pytest

from experiments.workloads import CLOSED, POISSON, Poisson, Workload, at_once

SHAPES = {
    "batch1": (1, 128, 256),
    "fixed": (256, 512, 128),
    "long-prompts-256": (512, 256, 64),
    "long-prompts-4096": (64, 4096, 64),
    "short-prompts": (1024, 32, 64),
    "decode-heavy-4": (4, 16, 64),
    "decode-heavy-256": (256, 16, 64),
    "burst-256-64": (192, 256, 64),
    "burst-1024-128": (256, 1024, 128),
    "burst-4096-256": (64, 4096, 256),
}


def test_the_offline_workload_is_the_usual_one():
    workload = CLOSED["offline"]()
    lens = [len(prompt) for prompt in workload.prompts]
    assert len(lens) == len(workload.output_lens) == 256
    assert (sum(lens), sum(workload.output_lens)) == (144831, 151188)  # as in every row so far
    for found in (lens, workload.output_lens):
        assert 100 <= min(found) < 130 and 1000 < max(found) <= 1024
    token_ids = {token_id for prompt in workload.prompts for token_id in prompt}
    assert min(token_ids) == 0 and max(token_ids) == 10_000
    assert CLOSED["offline"]() == workload


def test_the_others_have_one_shape():
    assert {"offline", *SHAPES} == set(CLOSED)
    for name, (num_requests, prompt_len, output_len) in SHAPES.items():
        workload = CLOSED[name]()
        assert [len(prompt) for prompt in workload.prompts] == [prompt_len] * num_requests
        assert workload.output_lens == [output_len] * num_requests
        assert workload.arrivals is None


def test_prompts_differ_and_are_drawn_alike_each_time():
    workload = at_once(8, 16, 4)
    assert len({tuple(prompt) for prompt in workload.prompts}) == 8
    assert all(0 <= t <= 10_000 for prompt in workload.prompts for t in prompt)
    assert workload == at_once(8, 16, 4)


@pytest.mark.parametrize(("name", "shape"), [(n, n.split("-")[1:]) for n in POISSON])
def test_poisson_arrivals(name, shape):
    poisson = POISSON[name]
    workload = poisson.at_rate(200.0)
    lens = {(len(p), n) for p, n in zip(workload.prompts, workload.output_lens, strict=True)}
    assert lens == {tuple(map(int, shape))} and poisson.burst_name in CLOSED
    assert len(workload.prompts) == len(workload.arrivals) == 200 * poisson.seconds
    gaps = [b - a for a, b in pairwise([0.0, *workload.arrivals])]
    # exponential: the deviation is the mean; 1200 gaps or more, so that four deviations are 12 %
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.12)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.12)


def test_one_rate_gives_one_trace_and_another_stretches_it():
    poisson = Poisson(4, 2, seconds=1.0, num_burst_requests=3)
    fast, slow = poisson.at_rate(20.0), poisson.at_rate(10.0)
    assert fast == poisson.at_rate(20.0) and len(slow.prompts) == 10
    assert slow.prompts == fast.prompts[:10]
    assert slow.arrivals == pytest.approx([2 * seconds for seconds in fast.arrivals[:10]])
    assert len(poisson.at_rate(0.1).prompts) == 1
    assert poisson.burst() == at_once(3, 4, 2)
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        poisson.at_rate(0)


def test_parts_are_dealt_in_turn_and_make_up_the_whole():
    whole = Workload([[0], [1], [2]], [5, 6, 7], [0.1, 0.2, 0.3])
    assert whole.part(0, 2) == Workload([[0], [2]], [5, 7], [0.1, 0.3])
    assert whole.part(1, 2) == Workload([[1]], [6], [0.2])
    assert whole.part(0, 1) == whole
    assert at_once(1, 4, 2).part(1, 2) == Workload([], [])


def test_a_rehearsal_is_short():
    whole = Workload([[0], [1], [2]], [5, 60, 7], [0.1, 0.2, 0.3])
    assert whole.rehearsal(2, 8) == Workload([[0], [1]], [5, 8])
    assert len(at_once(16, 4096, 64).rehearsal().prompts) == 8  # 32k tokens
    assert len(at_once(2, 40_000, 64).rehearsal().prompts) == 1
    assert not Workload([], []).rehearsal().prompts


def test_requests_run_to_their_full_length_at_0_6():
    for p, num_tokens in zip(at_once(3, 4, 9).params, [9, 9, 9], strict=True):
        assert (p.temperature, p.ignore_eos, p.max_tokens) == (0.6, True, num_tokens)
        assert (p.top_k, p.top_p, p.min_p) == (0, 1.0, 0.0)


def test_each_part_of_a_workload_for_each_is_the_whole():
    whole = Workload([[1], [2, 2], [3]], [4, 5, 6], [0.0, 0.5, 1.0])
    twice = whole.for_each(2)
    assert len(twice.prompts) == 6 and all(twice.part(i, 2) == whole for i in range(2))
    assert Workload([[1]], [2]).for_each(3).arrivals is None
