"""Turns: processes that measure on one machine, one at a time, so that what disturbs one disturbs the others alike."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.0005
_PATIENCE_S = 900.0
_STOPPED = -1


class Turns:
    """A counter in a file that all processes see.

    Args:
        file: of the counter; missing before the first turn.
        which: this process, from 0 on.
        count: processes.
    """

    def __init__(self, file: str, which: int, count: int) -> None:
        self._file = Path(file)
        self._which, self._count = which, count

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Wait for this process's turn, and end it after the body.

        Raises:
            RuntimeError: another process failed, or no turn came in 15 minutes.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while (turn := self._read()) % self._count != self._which or turn == _STOPPED:
            if turn == _STOPPED or time.monotonic() > deadline:
                raise RuntimeError("Another process that took turns with this one has failed.")
            time.sleep(_POLL_S)
        try:
            yield
        except BaseException:
            self.stop()
            raise
        self._write(turn + 1)

    def stop(self) -> None:
        """Tell the others that no turn will come any more."""
        self._write(_STOPPED)

    def _read(self) -> int:
        return int(self._file.read_text()) if self._file.exists() else 0

    def _write(self, turn: int) -> None:
        other = self._file.with_suffix(f".{self._which}")
        other.write_text(str(turn))
        os.replace(other, self._file)
