#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: compile in parallel, test, measure. Results go to $OUT
# (default: build/gpu).
# Usage: benchmarks/gpu_suite.sh [STEP ...], where a STEP is one of
#   compile test bench sanitize                                   (what runs without arguments)
#   sparse prefill model induction fidelity eviction mlx          (minutes each; most need SmolLM2)
#   vllm              (an hour; MODEL is a folder, VLLM_PYTHON the interpreter that has vLLM, MINUTES the time, GPUS how
#                      many there are; goes on where it ended)
#   real      the real models: $MODELS (folder of their files), $REAL_MINUTES (default 30); goes on where it was cut off
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-build/gpu} PYTHONPATH=src:tests PYTHONUNBUFFERED=1
export FORGEATTENTION_CACHE=${FORGEATTENTION_CACHE:-/tmp/forgeattention-cache}
mkdir -p "$OUT"
[ $# -gt 0 ] || set -- compile test bench sanitize
for step in "$@"; do
  case $step in
  compile)
    python3 - <<'PY'
import time
from multiprocessing import Pool
from cuda_cases import unique_kernels
from forgeattention.backends.cuda import nvrtc

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
  sparse)
    timeout 300 python3 -m pytest -q -p no:cacheprovider tests/test_cuda_sparse.py 2>&1 | tee "$OUT/pytest-sparse.log" | tail -20
    timeout 400 python3 benchmarks/sparse_attention.py --real smollm2 --json "$OUT/sparse_attention.json" 2>&1 | tee "$OUT/sparse.log"
    ;;
  prefill)
    timeout 300 python3 benchmarks/cuda_prefill.py --json "$OUT/prefill_attention.json" --encode-json "$OUT/encode.json" 2>&1 | tee "$OUT/prefill.log" ;;
  model)
    timeout 550 python3 benchmarks/bench_model.py --device cuda --memory 300000 --json "$OUT/model.json" 2>&1 | tee "$OUT/model.log"
    python3 benchmarks/plot_memory.py "$OUT/model.json" "$OUT/memory-300k.png"
    ;;
  induction)
    timeout 300 python3 benchmarks/induction.py --device cuda --lengths 300000 1000000 --json "$OUT/induction.json" \
      --caches balanced "balanced sparse=top_k=1024" "balanced evict=v3:0.5" "balanced evict=v3:0.5:host" 2>&1 | tee "$OUT/induction.log"
    ;;
  fidelity)
    OMP_NUM_THREADS=1 timeout 590 python3 benchmarks/fidelity.py --full --device cuda --batch 5 --workers 12 \
      --journal "$OUT/fidelity.jsonl" --json "$OUT/fidelity.json" --plot "$OUT/frontier.png" 2>&1 | tee "$OUT/fidelity.log" | tail -60
    ;;
  eviction)
    mkdir -p "$OUT/parts"
    for i in $(seq 0 14); do
      OMP_NUM_THREADS=1 timeout ${EVICTION_S:-590} python3 benchmarks/eviction.py sweep --device cuda --share "$i" 15 --json "$OUT/parts/eviction-$i.json" \
        >"$OUT/parts/eviction-$i.log" 2>&1 &
    done
    wait
    python3 benchmarks/eviction.py merge "$OUT"/parts/eviction-*.json --json "$OUT/eviction.json"
    ;;
  mlx)
    timeout 300 python3 -m pytest -q -p no:cacheprovider tests/test_mlx_cuda.py 2>&1 | tee "$OUT/pytest-mlx.log" | tail -20
    MLX_ENABLE_TF32=0 timeout 400 python3 benchmarks/bench_mlx.py fidelity --json "$OUT/mlx-fidelity.json" 2>&1 | tee "$OUT/mlx.log"
    timeout 660 python3 -c "from forgeattention.tools.cli import main; raise SystemExit(main())" selftest --device mlx --output "$OUT/selftest" 2>&1 | tee "$OUT/selftest.log"
    ;;
  real)
    timeout "$((${REAL_MINUTES:-30} * 60 + 60))" python3 benchmarks/real_suite.py --models "${MODELS:?folder of the model files}" \
      --out "$OUT/real" --minutes "${REAL_MINUTES:-30}" ${WHEEL:+--wheel "$WHEEL"} 2>&1 | tee -a "$OUT/real.log"
    ;;
  vllm)
    timeout 200 python3 -m pytest -q -p no:cacheprovider tests/test_cuda_paged.py 2>&1 | tee "$OUT/pytest-paged.log" | tail -20
    python3 benchmarks/vllm_suite.py --model "${MODEL:?a folder of a model}" --python "${VLLM_PYTHON:-python3}" \
      --gpus "${GPUS:-1}" --minutes "${MINUTES:-60}" --out "$OUT/vllm" 2>&1 | tee -a "$OUT/vllm.log"
    ;;
  sanitize)
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --report-api-errors no --tool $tool python3 -m pytest -q -p no:cacheprovider \
        tests/test_cuda_ops.py -k "${SANITIZE:-test_lengths and 511}" 2>&1 | tee "$OUT/$tool.log" | tail -6
    done
    ;;
  *)
    echo "gpu_suite.sh: expected a step among compile test bench sanitize sparse prefill model induction fidelity" \
      "eviction mlx real; got $step" >&2
    exit 2
    ;;
  esac
done
