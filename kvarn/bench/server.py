"""A server in a process group of its own: start it, wait until it serves, ask it, stop all of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvarn.errors import KVarNError

HOST = "127.0.0.1"
ANY_PORT = 0
"""Where a port is to be bound: one that is free."""
_LOG_TAIL_LINES = 25
_POLITE_STOP_S = 15
_ANSWER_TIMEOUT_S = 600
_PROGRESS_EVERY_S = 15
_POLL_S = 0.2


class ServerError(KVarNError):
    """A server didn't start, didn't answer or stopped: what, why and what to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        process: leader of its process group.
        url: address without a path.
        log: file with its output.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path


def choose_port(asked: int | None, preferred: int = ANY_PORT) -> int:
    """Return the port asked for; if none is, the preferred one or, where that is taken, any free one.

    Raises:
        ServerError: the port asked for is taken.
    """
    for port in (asked or preferred, ANY_PORT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
        if asked is not None:
            break
    raise ServerError(f"Port {asked} of {HOST} is taken; give another one or leave --port out.")


@contextlib.contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> Iterator[Server]:
    """Start a server that listens at a port, its output in a file; stop its whole process group at the end."""
    with group(command, environment, log) as process:
        yield Server(process, f"http://{HOST}:{port}", log)


@contextlib.contextmanager
def group(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command as leader of a process group, its output in a file; stop the whole group at the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process politely, then whatever is left of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_POLITE_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_on_signals() -> None:
    """Turn signals that would end this process into an exit that stops its servers first."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def wait_until_healthy(server: Server, timeout_s: float) -> None:
    """Wait for a server's health check, with a line of progress.

    Raises:
        ServerError: it stopped, or it was not healthy in time.
    """
    began = told = time.monotonic()
    every = 1 if sys.stdout.isatty() else _PROGRESS_EVERY_S
    while not is_healthy(server.url):
        check_alive(server)
        now = time.monotonic()
        if now - began > timeout_s:
            raise ServerError(
                f"The server was not healthy after {timeout_s:g} s; its log {server.log} tells how far it came, and "
                f"--timeout gives it longer.\n{tail_of(server.log)}"
            )
        if now - told >= every:
            told = now
            _say(f"starting: {now - began:.0f} s", end="\r" if every == 1 else "\n")
        time.sleep(_POLL_S)
    # Else another's server at the same port may be the one that answered.
    check_alive(server)
    _say(f"healthy after {time.monotonic() - began:.0f} s")


def _say(line: str, end: str = "\n") -> None:
    sys.stdout.write(line + end)
    sys.stdout.flush()


def is_healthy(url: str) -> bool:
    """Tell whether a server answers that it can serve."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            return bool(response.status == http.client.OK)
    except (OSError, http.client.HTTPException):
        return False


def check_alive(server: Server) -> None:
    """Raise a ServerError with the end of the log if a server is gone."""
    code = server.process.poll()
    if code is not None:
        raise ServerError(
            f"The server stopped with exit code {code}, for the reason at the end of its log {server.log}; correct "
            f"that and start again.\n{tail_of(server.log)}"
        )


def tail_of(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def call(url: str, body: Mapping[str, object] | None = None) -> Any:
    """Send a request and return the JSON of the answer.

    Raises:
        ServerError: no answer, or one that says that something failed.
    """
    return json.loads(_fetch(url, body))


def metrics(url: str) -> str:
    """Return what a server of that address tells Prometheus.

    Raises:
        ServerError: no answer, or one that says that something failed.
    """
    return _fetch(f"{url}/metrics", None).decode()


def _fetch(url: str, body: Mapping[str, object] | None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise ServerError(f"{url} answered {error.code}: {said}; the server's log has the cause.") from error
    except OSError as error:
        raise ServerError(f"{url} gave no answer ({error}); the server's log has the cause.") from error
