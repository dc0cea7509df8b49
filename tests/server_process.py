"""A server as users start it, for tests and benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

CLI = "from forgeattention.tools.cli import main; raise SystemExit(main())"
"""The console script `forgeattn`."""


class Server:
    """`forgeattn serve`, or vLLM's own server without our cache, on a free port of this machine.

    Args:
        model: as for `forgeattn serve`.
        log: where its output goes.
        arguments: the engine's own.
        packed: False for vLLM's own cache; `model` is a folder then.
        engine: "hf" or "vllm".
        code: the program in place of the console script `forgeattn`.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        arguments: list[str],
        packed: bool = True,
        engine: str = "vllm",
        code: str = CLI,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        at = ["--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        if packed:
            command = ["-c", code, "serve", engine, *at, *arguments]
        else:
            command = ["-m", "vllm.entrypoints.openai.api_server", *at, "--served-model-name", "smollm2", *arguments]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, seconds: float = 600) -> Server:
        """Returns once the server answers; raises RuntimeError when it ends or does not in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter or gauge over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self) -> None:
        """Ends the server and all processes that it started."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
