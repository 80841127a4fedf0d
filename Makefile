# Two commands do everything, set-up included:
#   make demo   builds, then runs GRPO on a real task with stock TRL and with fastreward, side by side
#   make test   builds, then runs the whole test suite
# PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# What pip does file by file, on all cores; some packages carry files that are not meant to compile.
BYTECODE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
TORCH := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test bench lint build clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: its CPU build (PyPI's pulls gigabytes of CUDA packages, and is taken only where PyTorch's own
# index can't be reached), then everything else against the constraints. Editable, so that Python edits need no
# reinstall; a changed C++ or CUDA source rebuilds.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) --extra-index-url $(TORCH_INDEX) torch==$(TORCH)+cpu || $(PIP) torch==$(TORCH)
	$(PIP) triton scikit-build-core pybind11 ninja cmake
	$(PIP) --no-build-isolation --config-settings cmake.define.FASTREWARD_WERROR=ON --editable '.[triton,trl,bench,demo,dev]'
	$(BYTECODE)
	touch $(STAMP)

# verl, OpenRLHF and areal pin CUDA packages, so without what they ask for. Where they can't be had their comparisons
# are skipped.
$(PEERS): $(STAMP)
	$(PIP) ray 'tensordict<=0.10' omegaconf codetiming einops && $(PIP) --no-deps verl openrlhf areal \
	  || echo "verl, OpenRLHF and areal can't be installed here: tests that compare with them will be skipped"
	$(BYTECODE)
	touch $(PEERS)

build: $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo/run.py

# Two workers with two threads each on two cores: a thread of torch's that waits must not keep its core busy.
test: $(STAMP) $(PEERS) lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) $(PEERS)
	$(BIN)/fastreward bench

clean:
	rm -rf $(VENV) build dist demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
