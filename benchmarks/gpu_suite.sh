#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: compile in parallel, test, measure. Results go to $OUT (default: build/gpu).
# Usage: benchmarks/gpu_suite.sh [compile] [test] [bench] [sanitize]
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-build/gpu} PYTHONPATH=src:tests PYTHONUNBUFFERED=1
export FORGEATTENTION_CACHE=${FORGEATTENTION_CACHE:-/tmp/forgeattention-cache}
mkdir -p "$OUT"
for step in "${@:-compile test bench sanitize}"; do
  case $step in
  compile)
    python3 - <<'PY'
import time
from multiprocessing import Pool
from cuda_cases import unique_kernels
from forgeattention.backends import nvrtc

def build(kernel):
    nvrtc.cubin(*kernel, "sm_90a")

begun = time.time()
with Pool() as pool:
    kernels = unique_kernels()
    pool.map(build, kernels, chunksize=1)
print(f"compiled {len(kernels)} kernels in {time.time() - begun:.0f} s")
PY
    ;;
  test) timeout 200 python3 -m pytest -q -p no:cacheprovider ${TESTS:-tests/test_cuda_ops.py} ${PYTEST_ARGS:-} 2>&1 | tee "$OUT/pytest.log" | tail -${TAIL:-40} ;;
  bench) timeout 300 python3 benchmarks/cuda_decode.py --json "$OUT/decode_attention.json" ${BENCH_ARGS:-} 2>&1 | tee "$OUT/bench.log" ;;
  sanitize)
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --report-api-errors no --tool $tool python3 -m pytest -q -p no:cacheprovider \
        tests/test_cuda_ops.py -k "${SANITIZE:-test_lengths and 511}" 2>&1 | tee "$OUT/$tool.log" | tail -6
    done
    ;;
  esac
done
