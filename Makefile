# Everything from nothing but a clone and Python 3.11: `make test`, `make reproduce`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
PRESET ?= quick
CANARY := .venv-canary
LATEST := nnsight diffusers transformers accelerate torch
# What stands directly on those: both engines, the clock, the sites, noise, the small pipelines and what is found out from them.
ENGINE := $(addprefix tests/test_,tracing.py engines.py detours.py sites.py schedule.py replay.py batching.py loading.py \
	noise.py noise_of_pipelines.py small_pipelines.py lens_on_pipelines.py discovery.py guidance.py \
	anatomy.py conformance.py loops.py)

.PHONY: install test check canary reproduce figures plants coverage clean

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

# The newest releases of what is underneath, past the upper bounds of pyproject.toml: pip says that they conflict, and installs
# them. The canaries run without conftest.py, which imports all of dit_lens; warnings are shown and fail nothing.
canary:
	$(PYTHON) -m venv --clear $(CANARY)
	$(CANARY)/bin/pip install --quiet --upgrade pip
	$(CANARY)/bin/pip install --quiet --editable ".[dev]"
	$(CANARY)/bin/pip install --quiet --upgrade $(LATEST)
	failed=0; \
	OMP_NUM_THREADS=1 $(CANARY)/bin/python -m pytest -W default --noconftest tests/test_canary*.py || failed=1; \
	OMP_NUM_THREADS=1 $(CANARY)/bin/python -m pytest -W default --numprocesses 2 --dist loadfile $(ENGINE) || failed=1; \
	exit $$failed

reproduce: install
	$(BIN)/dit-lens reproduce --preset $(PRESET) --out $(OUT)

# The committed results: full preset, meant for a GPU.
figures: install
	$(BIN)/dit-lens reproduce --preset full --out figures --engine hooks --jobs 3
	rm -rf figures/*/parts figures/report.html figures/logs figures/clean-runs figures/noised-runs

# docs/tools.md: every tool on every planted model, ten to twenty minutes on one core; fails where the table does not hold.
plants: install
	$(BIN)/python -m dit_lens.plants --out docs

# docs/coverage.md: every transformer class of the installed diffusers, two minutes on two cores; fails where one is wrong.
coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m dit_lens.coverage --out docs

clean:
	rm -rf $(VENV) $(CANARY) $(OUT) build dist *.egg-info
