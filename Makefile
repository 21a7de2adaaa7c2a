# One environment holds everything, in the versions of constraints/tested.txt.
# The newest Python that edgeship is tested on; another: make PYTHON=python3.11
PYTHON ?= $(shell scripts/newest_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
# Options for every installation, such as a package index: make setup PIP_OPTIONS="--index-url ..."
PIP_OPTIONS ?=
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --constraint constraints/tested.txt
# One thread a worker: the two workers are the two cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: setup demo demo-llm lint test test-all docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/tested.txt
	@test -n "$(PYTHON)" || { echo "edgeship needs Python 3.11, 3.12 or 3.13 (with venv): install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	touch $(STAMP)

demo: setup
	OMP_NUM_THREADS=2 $(BIN)/edgeship build samples/digits_cnn --target iphone15pro --target galaxy-s24 -o bundles/digits_cnn

demo-llm: setup
	OMP_NUM_THREADS=2 $(BIN)/edgeship build samples/storyteller --target iphone15pro --target galaxy-s24 --runtime coreml,coreai,tflite,onnx --profile small -o bundles/storyteller
	@for engine in onnx tflite coreml; do echo; echo "-- $$engine --"; \
	  $(BIN)/edgeship chat bundles/storyteller --runtime $$engine --plain --prompt "ROMEO:" --max-tokens 60 --temperature 0.8 || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not heavy"

test-all: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

docs: setup
	$(BIN)/python scripts/write_cli_page.py

clean:
	rm -rf $(VENV) bundles
