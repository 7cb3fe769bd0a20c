# `make demo` and `make test` work from a bare clone with Python >= 3.11, pip and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo emoji test lint package format bench soak mutants docs clean

help:
	@echo "make demo   trains both stages on handwritten digits and writes runs/digits/report.html"
	@echo "make emoji  draws emoji from their names, combinations never seen included: runs/emoji/report.html"
	@echo "make test   runs the whole suite"
	@echo "make lint   ruff and the type checker"
	@echo "make package  builds sdist and wheel, installs the wheel into an empty environment and runs its demo, shortened"
	@echo "make bench  measures throughput (pytest bench/): nine minutes on two cores"
	@echo "make docs   builds the guides and the API's pages into build/docs"
	@echo "make soak   breaks small runs at random for up to half an hour and counts what was lost"
	@echo "make mutants  puts small errors into the core, one at a time, and lists those that no test notices"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[data,vae,repa,ode,emoji,hub,dev]'
	@touch $@

demo: install
	$(BIN)/st-fast demo

emoji: install
	$(BIN)/st-fast demo emoji

# Some tests wait for something: two cores have work for three. Bytecode is kept, as the many processes that are started
# would each compile the modules again.
test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: install
	$(BIN)/python -m tests.package build/package

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m pytest bench/

soak: install
	$(BIN)/python -m tests.soak

mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/build.py build/docs

clean:
	rm -rf $(VENV) build *.egg-info
