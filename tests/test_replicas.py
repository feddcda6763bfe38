"""Engines in processes of their own: each serves its part, and none outlives a failure."""

import multiprocessing
from collections import Counter

import pytest

from experiments import shapes
from experiments.replicas import Replicas
from experiments.serving import figures
from experiments.workloads import Workload
from tests.checkpoints import SIZES

OPTIONS = {"device": "cpu", "load_format": "dummy", "num_kv_blocks": 200, "max_model_len": 400}
OPTIONS |= {"enable_prefix_caching": False}


@pytest.fixture
def folder(tmp_path):
    sizes = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}
    return shapes.write_config("Qwen3-0.6B", tmp_path, **sizes)


def test_two_replicas_serve_what_there_is(folder):
    at_once = Workload([[1], [2] * 3, [3] * 5], [4, 6, 8])
    arriving = Workload(at_once.prompts, at_once.output_lens, [0.0, 0.1, 0.4])
    with Replicas(folder, [OPTIONS, OPTIONS]) as replicas:
        assert replicas.environment["gpu"].startswith("cpu ")
        assert len(multiprocessing.active_children()) == 2
        for workload, at_least in ((at_once, 0.0), (arriving, 0.4)):
            served, seconds = replicas.run(workload)
            lens = Counter((s.num_prompt_tokens, s.num_output_tokens) for s in served)
            assert lens == {(1, 4): 1, (3, 6): 1, (5, 8): 1}
            row = figures(workload, served, seconds)
            assert (row["prompt_tokens"], row["output_tokens"]) == (9, 18)
            # what a request took fits between the common start and the last one's end
            assert seconds >= at_least
            assert max(s.ttft_ms + s.tpot_ms * (s.num_output_tokens - 1) for s in served) <= (
                seconds * 1e3
            )
        served, _ = replicas.run(at_once, num_engines=1)
        assert [s.num_prompt_tokens for s in served] == [1, 3, 5]  # not dealt out
        # the first replica's share is fine, the second's is not
        with pytest.raises(RuntimeError, match=r"engine 1 ended: (?s:.)*prompt must be 1 to"):
            replicas.run(Workload([[1], [2] * 500], [2, 2]))
        assert not multiprocessing.active_children()


def test_an_engine_that_cannot_start_says_why(folder):
    replicas = Replicas(folder, [OPTIONS | {"max_model_len": 1}])
    with pytest.raises(RuntimeError, match=r"engine 0 ended: (?s:.)*max_model_len must be"):
        replicas.__enter__()
    assert not multiprocessing.active_children()
