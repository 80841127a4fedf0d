# Two commands do everything, set-up included:
#   make demo   builds, then runs GRPO on a real task with stock TRL and with fastreward, side by side
#   make test   builds, then runs the whole test suite
# Between commits: make check, the tests of what has changed.
# PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
COMPILED := $(VENV)/.compiled
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
# Bytecode is made of what is imported, when it is: a fifth of what is installed.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
TORCH := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f)
# Two workers with two threads each on two cores: a thread of torch's that waits must not keep its core busy.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Kept even where the environment forbids it: every process of the tests would compile torch's Python anew.
export PYTHONDONTWRITEBYTECODE =
# Two things at a time: compiling beside installing, linting beside the first tests.
MAKEFLAGS += --jobs=2

.PHONY: demo test interpreted check bench lint build clean compat
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TOOLS): | $(BIN)/python
	$(PIP) scikit-build-core pybind11 ninja cmake
	touch $(TOOLS)

# In the folder in which pip builds for $(STAMP), which then finds everything compiled.
$(COMPILED): $(SOURCES) | $(TOOLS)
	mkdir -p build
	$(BIN)/python -c "from scikit_build_core.build import build_editable as build; \
	  build('build', {'cmake.define.FASTREWARD_WERROR': 'ON'})" >build/log 2>&1 || (cat build/log; exit 1)
	touch $(COMPILED)

# torch first and pinned: its CPU build (PyPI's pulls gigabytes of CUDA packages, and is taken only where PyTorch's own
# index can't be reached), then everything else against the constraints.
$(PACKAGES): pyproject.toml constraints.txt | $(TOOLS)
	$(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) --extra-index-url $(TORCH_INDEX) torch==$(TORCH)+cpu || $(PIP) torch==$(TORCH)
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  extras = [p['optional-dependencies'][e] for e in ('triton', 'trl', 'bench', 'demo', 'dev')]; \
	  print(*p['dependencies'], *sum(extras, []), sep='\n')" >$(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	touch $(PACKAGES)

# Editable, so that Python edits need no reinstall; a changed C++ or CUDA source rebuilds.
$(STAMP): $(COMPILED) $(PACKAGES)
	$(PIP) --no-build-isolation --no-deps --config-settings cmake.define.FASTREWARD_WERROR=ON --editable .
	touch $(STAMP)

# verl, OpenRLHF and areal pin CUDA packages, so without what they ask for (and torchrl, of the series that tensordict
# belongs to). Where they can't be had their comparisons are skipped.
$(PEERS): $(STAMP)
	$(PIP) ray 'tensordict<=0.10' omegaconf codetiming einops && $(PIP) --no-deps verl openrlhf areal 'torchrl==0.10.*' \
	  || echo "verl, OpenRLHF, areal and torchrl can't be installed here: tests that compare with them will be skipped"
	touch $(PEERS)

build: $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo/run.py

test: interpreted lint $(PEERS)
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# The Triton kernels on the CPU: Triton reads the variable when it is imported, hence a run of their own.
interpreted: $(STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -p no:cacheprovider tests/backends/triton/interpreted

check: $(STAMP)
	$(BIN)/python tools/check.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) $(PEERS)
	$(BIN)/fastreward bench

# Every version of the trainers, torch, Python and Triton that is claimed, each in an environment of its own: hours.
compat: $(STAMP) $(PEERS)
	$(BIN)/python tools/compat

clean:
	rm -rf $(VENV) build dist demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
