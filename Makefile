# One environment holds everything. torch is pinned exactly in pyproject.toml: a looser pin brings gigabytes of CUDA.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
# One thread a worker: the two workers are the two cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: setup demo demo-llm lint test test-all docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "numpy>=2,<2.4"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
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
	$(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not heavy"

test-all: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

docs: setup
	$(BIN)/python scripts/write_cli_page.py

clean:
	rm -rf $(VENV) bundles
