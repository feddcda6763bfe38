"""Where the benchmark launches: grids and green contexts of the same SMs, told apart in rows."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

import kernels
from experiments import peers
from experiments import places as places_module
from experiments.bench_kernels import measure
from experiments.dense_cases import Mlp
from experiments.kernel_case import Impl
from experiments.memory_cases import RmsNorm
from experiments.places import WHOLE_GPU, Place, Places
from experiments.timing import Effort, time_calls
from green.driver import GreenContextError, GreenContextUnsupported
from kernels.tile import device_sms
from tests.strategies import DEVICE

WHERE = torch.device(DEVICE)
BRIEF = Effort(graph_ms=0.1, reading_ms=1.0, min_replays=2, max_replays=2)


@dataclass
class FakeGreen:
    """In place of GreenStreams, on a GPU that cuts its SMs by eights."""

    granted: tuple[int, ...]
    streams: tuple[object, ...]
    is_open: bool = True

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def opened(monkeypatch) -> list[FakeGreen]:
    made: list[FakeGreen] = []

    class Streams:
        @staticmethod
        def of(asked: tuple[int, ...], device: torch.device) -> FakeGreen:
            if asked[0] > 132:
                raise ValueError(f"asked must be at most 132, got {asked[0]}")
            if asked[0] == 13:
                raise GreenContextError("cuGreenCtxCreate", 2, "OUT_OF_MEMORY", "free memory")
            made.append(FakeGreen((-(-asked[0] // 8) * 8,), (None,)))
            return made[-1]

    monkeypatch.setattr(places_module, "GreenStreams", Streams)
    return made


def test_each_number_has_a_grid_and_a_green_context(opened):
    with Places(WHERE) as places:
        found = places.of([60, 64])
        assert [(p.partitioning, p.sms_asked, p.num_sms) for p in found] == [
            ("grid", 60, 60),
            ("green", 60, 64),
            ("grid", 64, 64),
            ("green", 64, 64),
        ]
        assert places.of([60, 64]) == found and len(opened) == 2, "made once"
        assert all(green.is_open for green in opened)
    assert not any(green.is_open for green in opened)


def test_a_context_that_cannot_be_had_is_skipped_by_name(opened, capsys):
    with Places(WHERE) as places:
        assert [p.partitioning for p in places.of([13, 133, 8])] == [
            "grid",
            "grid",
            "grid",
            "green",
        ]
    text = capsys.readouterr().out
    assert "skipped a green context of 13 SMs: cuGreenCtxCreate failed" in text
    assert "skipped a green context of 133 SMs: asked must be at most 132" in text


def test_a_machine_without_green_contexts_says_so_once(monkeypatch, capsys):
    def refuse(asked: tuple[int, ...], device: torch.device) -> None:
        raise GreenContextUnsupported("the driver must be of CUDA 12.5 or later, got 12.2")

    monkeypatch.setattr(places_module.GreenStreams, "of", refuse)
    with Places(WHERE) as places:
        assert [p.partitioning for p in places.of([48, 56])] == ["grid", "grid"]
        places.of([64])
    assert capsys.readouterr().out.count("skipped green contexts: the driver must be") == 1


def test_places_read_well():
    assert WHOLE_GPU.text == "" and Place("green", 60, 64).text == " on 64 SMs (green)"


def test_ours_and_the_peers_are_measured_on_a_green_context(monkeypatch, capsys):
    told: list[int | None] = []
    case = Mlp(model="tiny", num_tokens=3, hidden=64, intermediate=96, dtype=torch.float16)
    monkeypatch.setattr("experiments.timing.ROTATED_BYTES", 1)
    seen = _spy(monkeypatch, told)
    stream = torch.cuda.Stream() if DEVICE == "cuda" else object()
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    places = [Place("grid", 2, 2), Place("green", 3, 4, stream)]
    rows = list(measure(case, WHERE, places, BRIEF))
    chains = ["cublas chain", "cublas chain, addmm"]
    with_cublas = ["cublas chain, told its SMs"] if DEVICE == "cuda" else []
    assert [(r.impl, r.partitioning) for r in rows] == [
        ("ours", "none"),
        ("ours", "grid"),
        ("ours", "green"),
        *((name, "none") for name in chains),
        *((name, "green") for name in chains + with_cublas),
    ]
    assert {(r.sms_asked, r.sms_granted) for r in rows if r.partitioning == "green"} == {(3, 4)}
    assert set(told) == {None, 2, 4}, "what was granted, not what was asked"
    if DEVICE == "cpu":
        assert seen == [stream if r.partitioning == "green" else None for r in rows]
        assert "skipped cublas chain, told its SMs on 4 SMs (green)" in capsys.readouterr().out


def test_cublas_is_told_for_the_length_of_a_call(monkeypatch):
    """It is a setting of the whole process: nothing of it may stay."""
    state = {"library": "default", "carveout": None}

    def library(name: str | None = None) -> str:
        state["library"] = name or state["library"]
        return state["library"]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library)
    monkeypatch.setattr(
        torch._C, "_set_sm_carveout_experimental", lambda n: state.update(carveout=n)
    )

    def run(i: int) -> None:
        assert state == {"library": "cublaslt", "carveout": device_sms(WHERE) - 1}
        if i:
            raise RuntimeError("a failing call")

    told = peers.told(Impl(name="chain", run=run), 1, WHERE)
    assert told.name == "chain, told its SMs"
    told.run(0)
    assert state == {"library": "default", "carveout": None}
    with pytest.raises(RuntimeError, match="a failing call"):
        told.run(1)
    assert state == {"library": "default", "carveout": None}


def _spy(monkeypatch, told: list[int | None]) -> list[object]:
    """The SMs that the launcher is told, and the streams that calls are timed on."""
    launch, seen = kernels.mlp, []

    def mlp(*args, num_sms, **options):
        told.append(num_sms)
        return launch(*args, num_sms=num_sms, **options)

    def timed(*args, stream, **options):
        seen.append(stream)
        return time_calls(*args, **options)

    monkeypatch.setattr(kernels, "mlp", mlp)
    monkeypatch.setattr("experiments.bench_kernels.time_calls", timed)
    return seen


def test_peers_stay_on_the_whole_gpu_where_a_case_does_not_sweep_them():
    case = RmsNorm(num_tokens=3, hidden=64, dtype=torch.float16)
    rows = list(measure(case, WHERE, [Place("green", 3, 4)], BRIEF))
    assert [r.impl for r in rows if r.partitioning == "green"] == ["ours"]


@pytest.mark.gpu
def test_a_graph_is_timed_on_the_sms_of_its_place():
    from green.probe import launch_records, record_launch, recorded_sms

    device, records = torch.device(DEVICE, 0), launch_records(DEVICE)
    with Places(device) as places:
        confined = [place for place in places.of([8]) if place.partitioning == "green"]
        if not confined:
            pytest.skip("no green contexts")
        stream = confined[0].stream
        time_calls(lambda i: record_launch(records), 1, device, BRIEF, stream=stream)
        assert len(recorded_sms(records)) == confined[0].num_sms == 8
