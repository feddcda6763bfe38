"""python -m engine: text and nothing else on stdout, an error is one line, and the status."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import __main__ as cli
from tests.checkpoints import cut, save_byte_model, save_random, save_speaker

ROOT = Path(__file__).resolve().parent.parent
ANSWER = " Grüße, 世界! 👩\u200d🚀 flies."
SMALL = ["--device", "cpu", "--num-kv-blocks", "64"]  # the default pool of a CPU is large
GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """Answers ">" with ANSWER."""
    return str(save_speaker(tmp_path_factory.mktemp("speaker"), [b">", *cut(ANSWER)]))


@pytest.fixture(scope="module")
def rambler(tmp_path_factory):
    return str(save_byte_model(tmp_path_factory.mktemp("bytes")))


def run(*argv: str) -> int:
    return cli.main([*argv, *SMALL])


def test_text_is_streamed_to_stdout_and_nothing_to_stderr(speaker, capsys):
    assert run(">", "--model", speaker, *GREEDY) == 0
    assert capsys.readouterr() == (ANSWER + "\n", "")


def test_text_comes_piece_by_piece(speaker, monkeypatch):
    written = []
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: written.append((args, kwargs)))
    assert run(">", "--model", speaker, *GREEDY) == 0
    pieces = [args[0] for args, _ in written if args]
    assert "".join(pieces) == ANSWER and len(pieces) > 5
    assert all(kwargs.get("flush") for _, kwargs in written)


def test_several_prompts_are_named_and_answered_in_turn(speaker, capsys):
    assert run(">", ">", "--model", speaker, "--max-tokens", "2", *GREEDY) == 0
    assert capsys.readouterr().out == ">>> >\n Gr\n" * 2


def test_json_has_results_and_metrics(speaker, capsys):
    assert run(">", ">", "--model", speaker, "--json", *GREEDY) == 0
    told = capsys.readouterr()
    assert told.err == "", "a bar where there is no terminal"
    results = json.loads(told.out)
    assert len(results) == 2
    for result in results:
        assert list(result) == ["prompt", "text", "token_ids", "finish_reason", "metrics"]
        assert (result["prompt"], result["text"]) == (">", ANSWER)
        assert result["finish_reason"] == "stop"
        assert result["metrics"]["num_generated_tokens"] == len(result["token_ids"])
    assert ANSWER in told.out, "text is not escaped"


def test_json_with_a_stop_string(speaker, capsys):
    assert run(">", "--model", speaker, "--json", "--stop", "世", "--stop", "zz", *GREEDY) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == " Grüße, "


def test_stop_and_max_tokens_end_the_text(speaker, capsys):
    assert run(">", "--model", speaker, "--stop", "flies", *GREEDY) == 0
    assert capsys.readouterr().out == ANSWER.partition("flies")[0] + "\n"
    assert run(">", "--model", speaker, "--max-tokens", "30", "--ignore-eos", *GREEDY) == 0
    assert capsys.readouterr().out.startswith(ANSWER + ">" + ANSWER[:3])


def test_chat_puts_the_prompt_into_the_template(rambler, capsys):
    argv = ["--model", rambler, "--json", "--ignore-eos", "--max-tokens", "4", *GREEDY]
    assert run("hi", "--chat", *argv) == 0
    chat = json.loads(capsys.readouterr().out)[0]
    assert run("[hi]", *argv) == 0
    plain = json.loads(capsys.readouterr().out)[0]
    assert chat["prompt"] == "hi" and chat["token_ids"] == plain["token_ids"]
    assert chat["metrics"]["num_prompt_tokens"] == 4


@pytest.mark.parametrize(("argv", "wanted"), [([], 8), (["--max-num-seqs", "3"], 3)])
def test_requests_at_a_time(argv, wanted):
    options = cli._engine_options(cli.parser().parse_args(["x", *argv]))
    assert options["max_num_seqs"] == wanted


def test_sampling_options_reach_the_sampler(rambler, capsys):
    argv = ["x", "--model", rambler, "--json", "--ignore-eos", "--max-tokens", "12"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--top-k", "1"], GREEDY):
        assert run(*argv, *more) == 0
        texts.append(json.loads(capsys.readouterr().out)[0]["token_ids"])
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]
    assert run(*argv, "--top-p", "0.5", "--min-p", "0.1", "--temperature", "0.8") == 0


def test_dummy_weights_and_other_engine_options(rambler, capsys):
    argv = ["--model", rambler, "--max-tokens", "3", "--load-format", "dummy", "--dtype", "float16"]
    assert run("x", *argv, "--kernels", "reference", "--enforce-eager", "--max-model-len", "9") == 0
    assert capsys.readouterr().err == ""


def test_a_pipelined_decode_says_what_a_serial_one_says(speaker, capsys):
    options = ["--decode-attention-sm", "40", "--decode-ffn-sm", "92", "--disable-green"]
    found = []
    for choice in ("static", "auto", "disabled"):
        argv = ["--model", speaker, "--decode-pipeline", choice, *options, *GREEDY]
        assert run(">", *argv) == 0
        found.append(capsys.readouterr())
    assert found[1] == found[2] == (found[0].out, "")
    assert found[0].err.startswith("warning: decode is serial, not pipelined: prompts run one at")
    assert found[0].err.count("\n") == 1


def test_static_is_pipelined_wherever_prompts_run_together(speaker, capsys, monkeypatch):
    runners, exit_ = [], cli.LLM.exit

    def noting(llm):
        runners.append(llm.decode_runner)
        exit_(llm)

    monkeypatch.setattr(cli.LLM, "exit", noting)
    argv = ["--model", speaker, "--decode-pipeline", "static", "--two-gpu", "off", *GREEDY]
    assert run(">", ">", "--json", *argv) == 0
    assert capsys.readouterr().err == ""
    steps = runners[0].get_pipeline_statistics()["num_steps_by_mode"]
    assert steps["in order"] > 0 and "serial" not in steps


def test_two_devices_say_what_one_says(speaker, capsys):
    for choice in ("on", "off", "auto"):
        assert run(">", "--model", speaker, "--two-gpu", choice, *GREEDY) == 0
        told = capsys.readouterr()
        assert told.out == ANSWER + "\n"
        wanted = "warning: prefill and decode share one device: device is 'cpu'\n"
        assert told.err == (wanted if choice == "auto" else "")


BAD = {
    "no such folder": (["--model", "./nowhere"], "no such checkpoint folder: ./nowhere"),
    "bad name": (["--model", "no-such-model"], "got 'no-such-model'"),
    "device": (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "max_tokens": (["--max-tokens", "0"], "max_tokens must be an integer >= 1, got 0"),
    "temperature": (
        ["--temperature", "-1"],
        "temperature must be a finite number >= 0 and at most",
    ),
    "top_p": (["--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
    "max_model_len": (["--max-model-len", "9999"], "max_model_len must be at most the model's 512"),
    "two GPUs": (["--two-gpu", "on", "--device", "cuda:0"], "auto, cuda or cpu for two GPUs"),
    "stop": (["--stop", ""], "stop must be a non-empty string"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_errors_are_one_line_and_status_2(rambler, name, form, capsys):
    argv, message = BAD[name]
    assert cli.main(["x", "--model", rambler, *SMALL, *argv, *form]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and message in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_bad_prompt_is_an_error_too(rambler, form, capsys):
    assert run("", "--model", rambler, *form) == 2
    assert "prompt must have at least one token" in capsys.readouterr().err
    assert run("x" * 2000, "--model", rambler, *form) == 2
    assert "got 2000" in capsys.readouterr().err


def test_chat_without_a_tokenizer(tmp_path, capsys):
    assert run("x", "--chat", "--model", str(save_random(tmp_path))) == 2
    assert "chat needs a checkpoint with a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["x", "--tempreature", "1"], ["x", "--max-tokens", "many"]])
def test_a_command_line_that_makes_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: python -m engine" in capsys.readouterr().err


def test_ctrl_c_is_status_130(speaker, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.LLM, "generate", interrupted)
    assert run(">", "--model", speaker, "--json") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bars_show_on_a_terminal(speaker, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(">", "--model", speaker, "--json", *GREEDY) == 0
    told = capsys.readouterr()
    assert "loading weights" in told.err and "requests" in told.err
    assert json.loads(told.out)[0]["text"] == ANSWER


def engine(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "engine", *argv, *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")


def test_as_a_command(speaker):
    result = engine(">", "--model", speaker, *GREEDY)
    assert (result.returncode, result.stdout) == (0, ANSWER + "\n"), result.stderr
    assert result.stderr == ""


def test_a_reader_that_has_had_enough_is_no_error(speaker):
    command = [sys.executable, "-m", "engine", ">", "--model", speaker, *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_as_a_command_that_fails():
    result = engine("x", "--model", "./nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no such checkpoint folder")
    assert result.stderr.count("\n") == 1
