"""The NEON kernels against the portable ones, cross-compiled and run under an emulator of Arm."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import tolerances

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
KERNELS = Path(__file__).parents[1] / "src" / "forgeattention" / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() in ("aarch64", "arm64"), reason="the tests of the ops run the NEON kernels themselves"
)
@pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="aarch64-linux-gnu-g++ and qemu-aarch64 are not here: NEON not run"
)
def test_neon_agrees_with_portable(tmp_path):
    sources = [KERNELS / "cpu" / name for name in ("dispatch.cpp", "kernels_portable.cpp", "kernels_neon.cpp")]
    program = tmp_path / "isa_agreement"
    subprocess.run(
        [
            *(
                COMPILER,
                "-std=c++17",
                "-O2",
                "-static",
                "-march=armv8.2-a+fp16+dotprod",
                "-DFORGEATTENTION_HAVE_NEON=1",
            ),
            *(f"-I{KERNELS}", Path(__file__).with_name("isa_agreement.cpp"), *sources, "-o", program),
        ],
        check=True,
        timeout=800,
    )
    limits = [str(tolerances.CPU_ATTENTION["float32"]), str(tolerances.CPU_ENCODE_BYTES)]
    done = subprocess.run([EMULATOR, "-cpu", "max", program, *limits], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == "neon"
