# Everything from nothing but a clone and Python 3.11: `make test`, `make reproduce`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
PRESET ?= quick

.PHONY: install test check reproduce figures plants clean

install: $(VENV)/.installed

# The virtual environment is made again only when what it is made from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

reproduce: install
	$(BIN)/dit-lens reproduce --preset $(PRESET) --out $(OUT)

# The committed results: full preset, meant for a GPU.
figures: install
	$(BIN)/dit-lens reproduce --preset full --out figures
	rm -rf figures/*/parts figures/report.html

# docs/tools.md: every tool on every planted model, ten to twenty minutes on one core; fails where the table does not hold.
plants: install
	$(BIN)/python -m dit_lens.plants --out docs

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
