"""Run a program that a model wrote: in a process of its own, with limits on time, memory and files.

That keeps mistakes from harming a measurement. It is no wall against malice: the network isn't closed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SECONDS = 10.0
_MEMORY_BYTES = 2 << 30
_FILE_BYTES = 1 << 20
_OPEN_FILES = 64
_LIMITS = f"""\
import resource
resource.setrlimit(resource.RLIMIT_CPU, ({int(_SECONDS)}, {int(_SECONDS)}))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({_FILE_BYTES}, {_FILE_BYTES}))
resource.setrlimit(resource.RLIMIT_NOFILE, ({_OPEN_FILES}, {_OPEN_FILES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
del resource
"""


def all_pass(programs: Sequence[str], seconds: float = _SECONDS) -> list[bool]:
    """Tell of each program whether it runs to its end without an error, several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: passes(program, seconds), programs))


def passes(program: str, seconds: float = _SECONDS) -> bool:
    """Tell whether a program runs to its last line without an error.

    Args:
        program: Python source. Leaving early, with whatever status, is no pass.
        seconds: after which it is stopped.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{_LIMITS}{program}\nprint('\\n{token}', flush=True)\n", encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
    return child.returncode == 0 and said.decode(errors="replace").rstrip().endswith(token)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()
