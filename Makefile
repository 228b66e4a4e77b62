# make demo: install and run the main job.  make test: install the test extras and run the suite, a process for each core
# (the slow tests: ARGS='-m slow').
# make docs: install the docs extra and build the documentation into site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/digits
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint docs clean

demo: $(VENV)/installed
	@if [ -e "$(OUT)/report.html" ]; then \
	  echo "$(OUT) holds the demo's results already; 'make demo OUT=runs/again' runs it anew"; \
	  $(BIN)/mas-embed report "$(OUT)"; \
	else \
	  OMP_NUM_THREADS=1 $(BIN)/mas-embed run configs/digits.yaml --out "$(OUT)" --resume --jobs auto; \
	fi

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mas-embed needs Python >= 3.11; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV); on Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt mas_embed/importance/rules/absolute_products.c | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
