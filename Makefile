# make demo | test | lint | docs | matrix: each sets itself up in .venv; only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: demo test lint docs matrix clean

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_packaging.py
	$(BIN)/python tools/make_docs.py --check

docs: $(READY)
	$(BIN)/python tools/make_docs.py

# The tests again, with the newest CPU build of onnxruntime (newer than onnxruntime-gpu) and the newest of the other packages.
matrix:
	$(MAKE) $(VENV)-matrix/.ready VENV=$(VENV)-matrix
	$(VENV)-matrix/bin/python -m pip uninstall -qq --yes onnxruntime-gpu
	$(VENV)-matrix/bin/python -m pip install -qq --upgrade --force-reinstall --no-deps onnxruntime
	$(VENV)-matrix/bin/python -m pip install -qq --upgrade onnx onnx-ir onnxscript tensorrt-rtx openvino
	$(MAKE) test VENV=$(VENV)-matrix

clean:
	rm -rf $(VENV) $(VENV)-matrix demo

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[rtx,dev]'
	@touch $@
