# `make demo` and `make test` set up .venv themselves, once, and install again when a source file changes.
PYTHON ?= python3
BIN := .venv/bin
PACKAGE := pyproject.toml CMakeLists.txt constraints.txt \
           $(shell find src -type f ! -name '*.pyc' ! -name '*.so')

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
# pip before 25.3 holds the build's own requirements to the first, later ones to the second.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test clean

demo: .venv/installed-demo
	$(BIN)/forgeattn demo --output demo

test: .venv/installed-test
	$(BIN)/python -m pytest

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-demo: EXTRAS := demo
.venv/installed-test: EXTRAS := demo,test,dev
.venv/installed-%: $(PACKAGE) | .venv/bin/python
	$(BIN)/python -m pip install -q '.[$(EXTRAS)]'
	$(BIN)/forgeattn models fetch smollm2
	@touch $@

clean:
	rm -rf .venv build
