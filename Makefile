# Every target makes what it needs: the virtual environment is built once and rebuilt when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SIMULATION := $(VENV)/.trtsim
TESTS ?= tests

.PHONY: demo test lint format bench-calibration bench-gpu bench-int8 clean help

help:
	@echo "make demo    run the whole pipeline on scikit-learn's digits; the report lands in runs/demo"
	@echo "make test    run the tests"
	@echo "make lint    ruff, mypy --strict, import-linter"
	@echo "make bench-calibration  what calibration costs, as a ratio to plain inference"
	@echo "make bench-gpu          how fast a GPU counts histograms, against the speed at which it copies memory"
	@echo "make bench-int8  INT8 on this CPU beside FP32 and other quantizers; rewrites docs/int8-cpu.md"
	@echo "make clean   remove the virtual environment and caches (runs/ is kept)"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "trt-int8 needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

demo: $(READY)
	$(BIN)/trt-int8 demo

# NVIDIA's Python bindings over simulated libraries, and pycuda, which compiles for a minute. Where they cannot be had,
# the tests skip with the reason.
$(SIMULATION): $(READY) $(wildcard tests/trtsim/*.py tests/trtsim/*.c tests/trtsim/*.cpp) docker/build_pycuda.sh
	@$(BIN)/python tests/trtsim/provision.py $(VENV)/trtsim && touch $@ || true

test: $(READY) $(SIMULATION)
	$(BIN)/python -m pytest -n logical --dist worksteal --cov --cov-report=term $(TESTS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-calibration: $(READY)
	$(BIN)/python benchmarks/calibration.py --output docs/calibration-benchmark.md

bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu_histogram.py

bench-int8: $(READY)
	$(BIN)/python benchmarks/int8_cpu.py --output docs/int8-cpu.md

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
