"""A server and a client in a few lines, in processes of their own, for what `kvarn bench serve` does around an engine.

    python fake_serving.py server PORT DTYPE FAULT
    python fake_serving.py client RUN.json OUT FAULT

The server speaks vLLM's Prometheus names; the client writes what both engines' clients write. Faults are named below.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kvarn.bench.engines import VLLM, CacheFacts
from kvarn.bench.server import call
from kvarn.bench.workloads import Run

KV_TOKENS = {"auto": 1000}
OTHER_KV_TOKENS = 4500
DIES, WANDERS, SILENT = "server dies", "answers differ", "answers are empty"
LOSES_REQUEST, LOSES_TOKEN, NO_FIGURES, NEEDS_PACKAGE = "request lost", "token lost", "no figures", "package missing"


class FakeEngine(VLLM):
    """Starts the fakes.

    Args:
        folder: where it notes what it started.
        faults: by cache dtype, what goes wrong.
    """

    name = "fake"
    metrics_flags = ()

    def __init__(self, folder: Path, faults: dict[str, str]) -> None:
        self.folder = folder
        self.faults = faults
        self.started: list[str] = []
        self.driven: list[Run] = []

    def command(self, model: str, kv_cache_dtype: str, host: str, port: int, *, cuda: bool) -> list[str]:
        self.started.append(kv_cache_dtype)
        fault = self.faults.get(kv_cache_dtype, "")
        return [sys.executable, __file__, "server", str(port), kv_cache_dtype, fault, str(self.folder)]

    def facts(self, url: str) -> CacheFacts:
        dtype = call(f"{url}/v1/models")["dtype"]
        return CacheFacts("fake 1", "m", dtype, KV_TOKENS.get(dtype, OTHER_KV_TOKENS), longest=4096)

    def client(self, run: Run, url: str, model: str, out: Path) -> list[str]:
        self.driven.append(run)
        asked = out.with_suffix(".run")
        asked.write_text(json.dumps(asdict(run)))
        dtype = call(f"{url}/v1/models")["dtype"]
        # The run that warms the server up is answered whole.
        fault = self.faults.get(dtype, "") if "warm-up" not in out.name else ""
        return [sys.executable, __file__, "client", str(asked), str(out), fault, url, dtype]


def serve(port: int, dtype: str, fault: str, folder: Path) -> None:
    """Answer until ended; leave a child behind that only the end of the process group stops."""
    if fault == DIES:
        sys.exit("out of memory")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"{dtype}.child").write_text(str(child.pid))
    asked = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the name that http.server looks up
            served = next(asked)
            counted = {
                "prefix_cache_hits": 25 * served,
                "prefix_cache_queries": 100 * served,
                "num_preemptions": served,
            }
            text = "\n".join(f'vllm:{name}_total{{engine="0"}} {value}.0' for name, value in counted.items())
            self._send({"dtype": dtype} if self.path == "/v1/models" else text)

        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(int(self.headers["Content-Length"]))
            text = {SILENT: " ", WANDERS: f"answer {next(asked)}"}.get(fault, f"answer of {dtype}")
            self._send({"choices": [{"text": text}]})

        def _send(self, body: Any) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def drive(run: dict[str, Any], out: Path, fault: str, dtype: str) -> None:
    """Write what a client would, the more context the slower."""
    if fault == NEEDS_PACKAGE:
        sys.exit("ModuleNotFoundError: No module named 'datasets'")
    if fault == NO_FIGURES:
        return
    completed = run["requests"] - (fault == LOSES_REQUEST)
    figures = {
        "completed": completed,
        "total_output_tokens": run["requests"] * run["output_tokens"] - (fault == LOSES_TOKEN),
        "duration": 2.0 if dtype == "auto" else 1.0,
        "median_ttft_ms": 10.0,
        "p99_ttft_ms": 20.0,
        "median_itl_ms": 1.0 + run["input_tokens"] * (0.004 if dtype == "auto" else 0.001),
        "p99_itl_ms": 9.0,
    }
    out.write_text(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
    else:
        drive(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]), sys.argv[4], sys.argv[6])
