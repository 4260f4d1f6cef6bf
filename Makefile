# make demo: the six runs of the README.  make test: the tests.  Both first make .venv, which takes a few minutes once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-long clean

demo: $(VENV)/installed
	$(BIN)/python patch.py -m corruption=gray,noise window=1,3,5

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(PYTEST) -m "not long"

test-long: $(VENV)/installed
	$(PYTEST)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitpatch needs Python 3.11 or newer; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
