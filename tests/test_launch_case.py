"""One case launched for a profiler: which it is, that it is checked, what is launched and seen."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from experiments import launch_case
from experiments.attention_cases import DecodeAttention, PrefillAttention
from experiments.copy_cases import CopyBlocksToPeer
from experiments.kernel_case import Case, Impl, Mismatch, Problem, row_error
from experiments.memory_cases import RmsNorm
from tests.strategies import DEVICE

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@dataclass(frozen=True, kw_only=True)
class Noted(Case):
    """Adds one to ones, and notes the copy and the SMs of each launch."""

    kernel: ClassVar[str] = "decode_attention"
    name: str
    launched: list[tuple[int, int | None]]
    result: float = 2.0
    shape = property(lambda self: self.name)
    bytes = property(lambda self: 10**8)  # three copies

    def build(self, device: torch.device, copies: int) -> Problem:
        out = torch.empty(1, 4, device=device)

        def ours(i: int, num_sms: int | None) -> None:
            self.launched.append((i, num_sms))
            out.fill_(self.result)

        return Problem(
            ours=ours,
            expected=lambda: (torch.full((1, 4), 2.0, device=device),),
            results=lambda: (out,),
            outputs=(out,),
            error=row_error,
            bound=0.0,
            peers=[Impl(name="a peer", run=lambda i: ours(i, -1))],
        )


@pytest.fixture
def cases(monkeypatch):
    """What the command finds instead of all cases."""
    found: list[Case] = []
    monkeypatch.setattr(launch_case, "all_cases", lambda: found)
    return found


def run(*argv: str) -> None:
    launch_case.main([*argv, "--device", DEVICE])


def test_a_kernel_is_checked_and_launched(cases, monkeypatch, capsys):
    monkeypatch.setattr("experiments.timing.ROTATED_BYTES", 1)
    cases += [DecodeAttention(context_lens=(40, 17), **HEADS), RmsNorm(num_tokens=3, hidden=64)]
    run("decode_attention", "B=2", "--launches", "3", "--num-sms", "2")
    text = capsys.readouterr().out
    assert f"decode_attention: ours on 2 SMs (grid): B=2 context={cases[0].context_text} " in text
    assert "launched 3 times, 2 copies in turn" in text
    run("rms_norm", "T=3 N=64")
    assert "rms_norm: ours: T=3 N=64: as the reference; launched 5" in capsys.readouterr().out


def test_the_check_comes_first_and_copies_take_turns(cases):
    launched = []
    cases.append(Noted(name="B=1", launched=launched))
    run("decode_attention", "B=1")
    assert launched == [(0, None), (1, None), (2, None), (0, None), (1, None), (2, None)]
    launched.clear()
    run("decode_attention", "B=1", "--num-sms", "56", "--launches", "2")
    assert launched == [(0, 56), (1, 56), (2, 56)]
    launched.clear()
    run("decode_attention", "B=1", "--impl", "a peer", "--launches", "1")
    assert launched == [(0, -1), (1, -1)]


def test_what_is_wrong_is_not_launched_for_a_profiler(cases):
    launched = []
    cases.append(Noted(name="B=1", launched=launched, result=3.0))
    with pytest.raises(Mismatch, match="ours must be within"):
        run("decode_attention", "B=1")
    assert launched == [(0, None)]


def test_a_case_is_found_by_its_first_words_alone(cases):
    names = ("B=1 context=4 H=2", "B=1 context=40 H=2", "B=2 greedy", "B=2 greedy top_k=5")
    notes = {name: [] for name in names}
    cases += [Noted(name=name, launched=notes[name]) for name in names]
    cases.append(RmsNorm(num_tokens=3, hidden=64))
    run("decode_attention", "B=1 context=4")
    run("decode_attention", "B=2 greedy")  # a whole shape, though another goes on
    assert [bool(notes[name]) for name in names] == [True, False, True, False]


@pytest.mark.parametrize(
    ("argv", "listed", "not_listed"),
    [
        (["decode_attention", "B=1"], ["got 'B=1'", "B=1 x", "B=1 y"], ["B=2 z", "T=3"]),
        (["decode_attention", "B"], ["got 'B'", "B=1 x", "B=1 y", "B=2 z"], ["T=3"]),
        (["decode_attention", "B=2", "--impl", "none"], ["['ours', 'a peer'], got 'none'"], []),
        (["rms_norm", "T=3", "--num-sms", "8"], ["takes it, got ours rms_norm"], []),
        (["decode_attention", "B=2", "--impl", "a peer", "--num-sms", "8"], ["got a peer"], []),
        (["decode_attention", "B=2", "--num-sms", "0"], ["--num-sms must be positive, got 0"], []),
        (["decode_attention", "B=2", "--launches", "0"], ["--launches must be positive"], []),
        (["gemm", "B=2"], ["invalid choice: 'gemm'"], []),
    ],
)
def test_what_cannot_be_launched_is_said(cases, argv, listed, not_listed, capsys):
    launched = []
    cases += [Noted(name=name, launched=launched) for name in ("B=1 x", "B=1 y", "B=2 z")]
    cases.append(RmsNorm(num_tokens=3, hidden=64))
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and not launched
    assert all(words in text for words in listed) and not any(w in text for w in not_listed)


def test_a_case_for_another_machine_is_refused(cases, monkeypatch, capsys):
    monkeypatch.setattr("experiments.copy_cases.peer_device", lambda device: None)
    cases.append(CopyBlocksToPeer(num_blocks=3, num_layers=0, num_kv_heads=1, head_dim=16))
    with pytest.raises(SystemExit):
        run("copy_blocks to peer", "blocks=3")
    assert "must have what this machine lacks" in capsys.readouterr().err


def test_sms_reach_every_launcher_that_takes_them(monkeypatch):
    """The command refuses them elsewhere: a case that dropped them would be measured as another."""
    told = []
    monkeypatch.setattr(
        "kernels.prefill_attention", lambda *args, num_sms, **more: told.append(num_sms)
    )
    case = PrefillAttention(context_lens=(5,), dtype=torch.float16, **HEADS)
    case.build(torch.device(DEVICE), 1).ours(0, 7)
    assert told == [7]


def test_a_profiler_sees_the_launches_alone(monkeypatch):
    """Between its marks, and done before the second."""
    seen: list[object] = []
    for name in ("profiler.start", "profiler.stop"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: seen.append(name))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: seen.append("wait"))
    launch_case.launch(seen.append, 2, 3, torch.device("cuda", 0))
    assert seen == ["wait", "profiler.start", 1, 0, 1, "wait", "profiler.stop"]
    seen.clear()
    launch_case.launch(seen.append, 2, 1, torch.device("cpu"))
    assert seen == [1]


def test_the_buffers_are_those_of_the_benchmark(cases, monkeypatch):
    built = []
    case = RmsNorm(num_tokens=3, hidden=64)
    build = RmsNorm.build
    monkeypatch.setattr(RmsNorm, "build", lambda *args: built.append(args) or build(*args))
    cases.append(case)
    run("rms_norm", "T=3")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    device = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
    assert built == [(replace(case, dtype=dtype), device, case.copies)]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        launch_case.main(["rms_norm", "T=1"])
    assert "--device must be a GPU of this machine" in capsys.readouterr().err
