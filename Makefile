# `make demo`, `make eval` and `make test` set up .venv themselves, once, and install again when a source file changes.
PYTHON ?= python3
BIN := .venv/bin
KERNELS = $(shell find src tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' -o -name '*.metal')
PACKAGE := pyproject.toml CMakeLists.txt constraints.txt \
           $(shell find src -type f ! -name '*.pyc' ! -name '*.so')

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
# pip before 25.3 holds the build's own requirements to the first, later ones to the second.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo eval test test-vllm soak sanitize lint format bench docs site clean

demo: .venv/installed-demo
	$(BIN)/forgeattn demo --output demo

# RULER and the constructed model first: the report shows their rows.
eval: .venv/installed-demo
	mkdir -p eval
	$(BIN)/forgeattn eval ruler --lengths 1024 --samples 1 --json eval/ruler.json
	$(BIN)/forgeattn eval induction --lengths 4096 16384 --json eval/induction.json
	$(BIN)/forgeattn eval kl --length 1536 --windows 1 --layers --json eval/kl.json
	$(BIN)/forgeattn plan --json eval/plan.json
	$(BIN)/forgeattn report --test single multi distractors qa --lengths 500 1500 --kl-length 1024 \
	    --ruler eval/ruler.json --induction eval/induction.json --output eval/report

test: .venv/installed-test
	$(BIN)/python -m pytest

# Some hours: see CONTRIBUTING.md for its parts and its options, such as SOAK="--cases 500 --minutes 5".
soak: .venv/installed-test
	$(BIN)/python -m pytest tests/soak $(SOAK)

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, and their threads under ThreadSanitizer
# (g++ on Linux). Python itself is not instrumented, so the runtime is preloaded and leaks are not looked for. Torch's
# memory is not instrumented either; what the kernels do with it is.
SANITIZED := tests/test_ops_attention.py tests/test_ops_compact.py tests/test_ops_encode.py tests/test_ops_pages.py \
             tests/test_ops_scores.py tests/test_ops_sparse.py tests/test_ops_steps.py tests/test_numerics.py
sanitize: build/sanitize/address,undefined/site build/sanitize/thread/site
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    PYTHONPATH=build/sanitize/address,undefined/site $(BIN)/python -m pytest -k "not reference" $(SANITIZED)
	LD_PRELOAD=$$(g++ -print-file-name=libtsan.so) TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0 \
	    PYTHONPATH=build/sanitize/thread/site setarch -R $(BIN)/python tests/thread_races.py

build/sanitize/%/site: $(PACKAGE) .venv/installed-test
	rm -rf build/sanitize/$*
	mkdir -p build/sanitize/$*
	$(BIN)/python -m pip wheel . -q --no-deps -w build/sanitize/$* \
	    --config-settings=cmake.define.FORGEATTENTION_SANITIZE=$*
	cd build/sanitize/$* && ../../../$(BIN)/python -m zipfile -e *.whl site

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)
	$(BIN)/python docs/wrap.py --check *.md docs/*.md
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)
	$(BIN)/python docs/wrap.py *.md docs/*.md

# Attention of one new token beside torch's on this machine. benchmarks/ has the other measurements.
bench: .venv/installed-demo
	mkdir -p build
	$(BIN)/forgeattn bench decode --json build/bench-decode.json

docs: .venv/installed-test
	$(BIN)/python docs/make_api.py

# The pages as a site in build/site; a warning is an error. Pages link to each other as they do in the repository.
site: | .venv/bin/python
	rm -rf build/site-source
	mkdir -p build/site-source/benchmarks build/site-source/src/forgeattention/kernels/metal
	cp -r README.md CONTRIBUTING.md CHANGELOG.md docs build/site-source
	cp -r benchmarks/results build/site-source/benchmarks
	cp src/forgeattention/kernels/metal/README.md build/site-source/src/forgeattention/kernels/metal
	$(BIN)/python -m pip install -q "mkdocs-material>=9.6"
	$(BIN)/python -m mkdocs build

# vLLM holds others of our requirements back, so it has an environment of its own; its list is whole, and leaves out what
# vLLM names but text models do not need.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/vllm_engine

.venv-vllm/environment: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	PIP_CONSTRAINT= .venv-vllm/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	@touch $@

.venv-vllm/installed: $(PACKAGE) .venv-vllm/environment
	.venv-vllm/bin/python -m pip install -q --no-deps .
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-demo: EXTRAS := demo
.venv/installed-test: EXTRAS := demo,test,dev
.venv/installed-%: $(PACKAGE) | .venv/bin/python
	$(BIN)/python -m pip install -q '.[$(EXTRAS)]'
	$(BIN)/forgeattn models fetch smollm2
	@touch $@

clean:
	rm -rf .venv .venv-vllm build
