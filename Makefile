# make demo    install, pre-train on the embedded data, say where the results are
# make test    install, run the tests (no PyTorch)
# make parity  add PyTorch and others, compare with independent implementations
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
DEMO ?= runs/demo

.PHONY: demo test test-all parity lint format types clean

demo: $(VENV)/.ssljax
	$(PY) -m ssljax.main --config=configs/mae_digits.py --workdir=$(DEMO)
	@$(PY) -m ssljax.reporting $(DEMO)

test: $(VENV)/.test
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not parity"

test-all: $(VENV)/.test
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not parity"

parity: $(VENV)/.parity
	$(PY) -m pytest -n auto --dist loadfile -m parity tests/parity

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.test
	$(PY) -m mypy

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.ssljax: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[test]"
	touch $@ $(VENV)/.ssljax

# torchvision, timm and lightly would bring the CUDA build of PyTorch with them: installed without their needs.
$(VENV)/.parity: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[test,parity]"
	$(PIP) --no-deps torchvision==0.23.0 timm lightly lightly-utils
	touch $@ $(VENV)/.test $(VENV)/.ssljax
