# Each target does everything from nothing: it needs Python >= 3.11, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
WORKERS := -n 2 --dist worksteal
define newline


endef
CSRC := $(wildcard csrc/*.* csrc/*/*)
BUILT_FROM := $(CONSTRAINTS) pyproject.toml setup.py scripts/kernels.py $(CSRC)

# Byte code is written whatever the shell says: torch's modules would be compiled anew by every process of the tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo lab bench test interpret gpu test-all coverage durations models lint docs site-check sanitize clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train the tutorial's network with and without batch normalization (runs/demo/report.html)"
	@echo "make lab       measure what is claimed of batch normalization (runs/lab/report.html)"
	@echo "make bench     measure against the byte limit and against the others (runs/bench/report.html)"
	@echo "make test      run the tests"
	@echo "make test-all  run those marked slow too: the trainings that show each effect's direction"
	@echo "make coverage  run the tests and measure which lines they run"
	@echo "make interpret run the GPU kernels in Triton's interpreter, and compile them for four GPUs; needs none"
	@echo "make gpu       on a machine with a GPU: its tests, its benchmarks, a verdict for each target (runs/gpu/)"
	@echo "make models    every operation on 45 architectures of other libraries (docs/models.md; some 5 GB of packages)"
	@echo "make lint      ruff, clang-format and pyright"
	@echo "make docs      build docs/ into site/"
	@echo "make site-check  open every page of the site in Chromium: nothing cut, no console message, no other host; accessibility"
	@echo "make sanitize  fuzz the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make clean     remove the virtual environment and what was built"

# A warning of the C++ compiler is an error in continuous integration (which sets CI) and for the fuzzer; elsewhere it is only shown, since
# a newer compiler may know more of them.
$(VENV)/dev: export BATCHNORM_WERROR ?= $(CI)
build/fuzz sanitize: export BATCHNORM_WERROR ?= 1

# The demonstration and the laboratory need the kernels for this processor alone; the tests compare those for all.
$(VENV)/lab: $(BUILT_FROM)
	@BATCHNORM_BUILDS=host $(PYTHON) scripts/environment.py $(VENV) lab $(CONSTRAINTS)
	@touch $@

$(VENV)/dev: $(BUILT_FROM)
	@BATCHNORM_BUILDS=all BATCHNORM_REQUIRE_KERNELS=$(BATCHNORM_WERROR) $(PYTHON) scripts/environment.py $(VENV) dev $(CONSTRAINTS)
	@touch $@ $(VENV)/lab

demo: $(VENV)/lab
	$(BIN)/batchnorm demo

lab: $(VENV)/lab
	$(BIN)/batchnorm lab run all
	$(BIN)/batchnorm lab report

bench: $(VENV)/lab
	$(BIN)/batchnorm env
	$(BIN)/batchnorm bench --json runs/bench/rows.json --report runs/bench/report.html --force

# Another torch: make test CONSTRAINTS=constraints-2.14.txt VENV=.venv-2.14
test: $(VENV)/dev
	$(BIN)/python -m pytest $(WORKERS)

# The programs for GPUs in Triton's interpreter, and compiled ahead of time. Triton lies in folders of its own: torch.compile would generate
# other code if it found it. On another system than Linux there is none, and torch's operators run on its GPUs.
TRITON := $(if $(filter Linux,$(shell uname -s)),build/triton-3.6.0 build/triton-3.7.1)

build/triton-%: Makefile | $(VENV)/dev
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target $@ triton==$*
	@touch $@

interpret: $(VENV)/dev $(TRITON)
	$(foreach triton,$(TRITON),TRITON_INTERPRET=1 PYTHONPATH=$(triton) $(BIN)/python -m pytest $(WORKERS) tests/gpu$(newline))
	$(foreach triton,$(TRITON),PYTHONPATH=$(triton) $(BIN)/python -m pytest $(WORKERS) tests/gpu/test_ahead_of_time.py$(newline))

# In the environment whose torch is built for this GPU, not in one of ours: make gpu PYTHON=python
gpu:
	$(PYTHON) scripts/gpu.py

# Tracing lines costs half of the time again, so it is a command of its own.
coverage: $(VENV)/dev
	$(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term --cov-fail-under=95

# Which tests take the longest, for the order in which they begin.
durations: $(VENV)/dev
	$(BIN)/python -m pytest $(WORKERS) --durations=0 --durations-min=1 > build/durations.txt
	$(PYTHON) scripts/durations.py build/durations.txt tests/durations.json

test-all: $(VENV)/dev
	BATCHNORM_ALL_EXAMPLES=1 $(BIN)/python -m pytest $(WORKERS) -m ''

# torchvision goes with one torch alone, so both are pinned.
.venv-models/models: constraints-models.txt $(BUILT_FROM)
	@BATCHNORM_BUILDS=host $(PYTHON) scripts/environment.py .venv-models models constraints-models.txt
	@touch $@

models: .venv-models/models
	.venv-models/bin/python benchmarks/models.py --json benchmarks/results/models.json --page docs/models.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# What the browser checks need from npm: the driver of Chromium, and the rules of accessibility.
build/browser/node_modules: Makefile
	npm install --silent --no-fund --no-audit --prefix build/browser playwright-core@1.65.1 axe-core@4.14.1
	@touch $@

# Every page and report in headless Chromium, from disk and over http, narrow and wide; it needs Chromium and node.
site-check: docs build/browser/node_modules
	node scripts/site_check.mjs site
	$(BIN)/python -m pytest tests/test_report_browser.py

SANITIZERS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

build/fuzz: scripts/kernels.py $(CSRC)
	CXXFLAGS="$(SANITIZERS)" BATCHNORM_BUILDS=all $(PYTHON) scripts/kernels.py --fuzzer $@

# Each build that this processor can run; then wrong arguments straight at the operators.
sanitize: build/fuzz $(VENV)/dev
	build/fuzz 3000
	BATCHNORM_INSTRUCTION_SET=AVX-512 build/fuzz 1000
	BATCHNORM_INSTRUCTION_SET=AVX2 build/fuzz 1000
	BATCHNORM_INSTRUCTION_SET=baseline build/fuzz 1000
	rm -rf build/asan && mkdir -p build/asan && cp -r src/batchnorm build/asan/
	CXXFLAGS="-fsanitize=address -g" $(BIN)/python scripts/kernels.py build/asan/batchnorm/kernels/_cpu.so
	for set in AVX-512 AVX2 baseline; do BATCHNORM_INSTRUCTION_SET=$$set PYTHONPATH=build/asan ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python -m tests.hostile 3000 || exit 1; done

clean:
	rm -rf $(VENV) .venv-models build site
