"""`forgeattn selftest`: does this machine compute what the others do, and how fast; one JSON file and one page.

Every step runs in a process of its own, so that a step which ends its process, or hangs, is a line of the report and
not its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ...util.environment import environment
from ...util.files import write_json
from . import page

STEPS = {
    "ops": "every op against the float64 oracle, and what compiling its kernels takes",
    "decode": "attention of one new token beside MLX's and mlx-lm's",
    "needles": "a model finds what was hidden in a text",
    "generation": "a model's speed and memory with each cache",
}
LIMIT = 600.0
"""Seconds for all steps together."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps, prints a line for each, writes the report to `args.output`; returns it.

    Raises:
        RuntimeError: a step failed; the report is written.
    """
    folder: Path = args.output
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    report: dict[str, Any] = {"machine": machine(), "env": environment(), "device": args.device, "steps": {}}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    for name in args.steps:
        print(f"{name}: {STEPS[name]} ...", flush=True)
        left = LIMIT - (time.perf_counter() - start)
        found = step(name, args, left) if left > 10 else {"status": "skipped", "reason": "no time is left"}
        report["steps"][name] = found
        print(f"  {found['status']} in {found.get('seconds', 0):.0f} s{_because(found)}", flush=True)
    report["seconds"] = time.perf_counter() - start
    write_json(folder / "selftest.json", report)
    (folder / "selftest.html").write_text(page.page(report))
    print(f"{folder / 'selftest.html'} and selftest.json beside it: attach both to a report")
    failed = [name for name, found in report["steps"].items() if found["status"] == "failed"]
    if failed:
        raise RuntimeError(f"[selftest] failed: {', '.join(failed)}")
    return report


def step(name: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """What one step found, from a process of its own: `status` ("passed", "failed", "skipped"), `reason`, `seconds`
    and the step's own fields."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        asked = {"step": name, "device": args.device, "model": args.model, "quick": args.quick, "out": str(out)}
        command = [sys.executable, "-m", "forgeattention.tools.selftest", json.dumps(asked)]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit)
            said, code = done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            text = error.stderr or ""
            said, code = text if isinstance(text, str) else text.decode(errors="replace"), None
        seconds = time.perf_counter() - start
        found = json.loads(out.read_text()) if out.is_file() else {}
    if code is None:
        found |= {"status": "failed", "reason": f"not done within {limit:.0f} s"}
    elif code or not found:
        last = " ".join(said.strip().splitlines()[-1:])
        found |= {"status": "failed", "reason": f"the process ended with {code}: {last}"}
    if found["status"] == "failed":
        found["stderr"] = said[-8000:]
    return {**found, "seconds": seconds}


def machine() -> dict[str, Any]:
    """System, processor, memory and GPU, in words."""
    import os
    import platform

    mac = platform.mac_ver()[0]
    found = {"system": f"macOS {mac}" if mac else platform.platform(), "processor": environment()["processor"]}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    try:
        import mlx.core as mx

        if mx.default_device().type == mx.gpu:
            gpu = mx.device_info(mx.gpu)
            found["gpu"] = str(gpu.get("device_name"))
            if "architecture" in gpu:
                found["architecture"] = str(gpu["architecture"])
            if size := gpu.get("max_recommended_working_set_size"):
                found["gpu_memory"] = f"{int(size) / 2**30:.1f} GiB"
    except ImportError:
        pass
    return found


def _because(found: dict[str, Any]) -> str:
    return f": {found['reason']}" if found.get("reason") else ""
