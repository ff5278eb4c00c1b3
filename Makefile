PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Everything is installed into .venv: settings that would lead pip or Python out of it are not passed on.
unexport PIP_PREFIX PIP_ROOT PIP_TARGET PIP_USER PYTHONHOME PYTHONPATH PYTHONUSERBASE

.PHONY: demo test check clean

demo: $(VENV)/.ready
	$(BIN)/python examples/digits.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Written only after everything is installed, so an interrupted set-up is taken up again.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
