# Two commands for a newcomer, `make demo` and `make test`; both set up .venv the first time and reuse it after.
# `make demo TORCH=cpu` installs torch without CUDA's libraries (TORCH is a name below TORCH_INDEX: cpu, cu126, ...).
# `make gpu` installs nothing: it takes the interpreter that it is given, else that of .venv, else python3.
PYTHON ?= python3
BIN := .venv/bin
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
TORCH_INDEX := https://download.pytorch.org/whl
PARTS ?= abcd
OUT ?= runs/gpu
DATA ?= data
MINUTES ?= 8
MAKEFLAGS += --no-print-directory

.PHONY: demo test test-slow gpu lint types docs clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py --workdir=runs/demo

test: .venv/installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

gpu:
	@$(GPU_PYTHON) scripts/gpu_check.py --parts=$(PARTS) --out=$(OUT) --data=$(DATA) --minutes=$(MINUTES)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy flowmaps samplers training configs scripts

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "open runs/site/index.html"

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowmaps needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing flowmaps and its dependencies into .venv$(if $(TORCH),, (on Linux about 6 GB, of which 5 GB are for CUDA: TORCH=cpu leaves them out))"
	$(if $(TORCH),$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX)/$(TORCH))
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
