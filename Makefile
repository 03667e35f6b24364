# make serve   install into .venv and serve the demo model      make serve MODEL=<hub id or folder> NUM_SHARD=2 PORT=8080
# make test    install what the tests need and run them         make lint, make test-matrix, make proto: see README.md
# CUDA=1       take the CUDA build of torch instead of the CPU build

PYTHON ?= python3
MODEL ?= demo
NUM_SHARD ?= 1
PORT ?= 3000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

ifeq ($(CUDA),1)
CONSTRAINTS :=
else
CONSTRAINTS := -c deploy/constraints-cpu.txt
endif

.PHONY: serve test test-matrix lint format proto clean

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml deploy/constraints-cpu.txt
	$(BIN)/pip install $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install $(CONSTRAINTS) -e '.[test]'
	$(BIN)/pip install --no-deps text-generation==0.7.0
	touch $@

serve: $(VENV)/.installed
	$(BIN)/text-generation-launcher --model-id $(MODEL) --num-shard $(NUM_SHARD) --port $(PORT) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/pytest -n 2 -m "not matrix and not gpu"

test-matrix: $(VENV)/.installed-test
	$(BIN)/pytest -n 2 -m matrix --timeout 1200

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed
	$(BIN)/python -m grpc_tools.protoc -I tgi_proto=proto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		tgi_proto/generate.proto

clean:
	rm -rf $(VENV) build *.egg-info
