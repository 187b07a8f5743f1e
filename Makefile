# `make run` and `make test` do everything on a fresh machine; what is installed is not installed again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-fast lint docs bench gpu clean

run: .venv/.run
	$(BIN)/python main.py --model mgser_sam --dataset seq-digits

test: .venv/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Something of every part, in about a minute: imports, flags, data, memory, every method and optimizer, networks, resume.
FAST := $(patsubst %,tests/test_%.py,imports metrics buffer objective stream task_sizes pinned layout lock) \
	tests/test_optimizers.py::test_keeps_the_contracts

test-fast: .venv/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(FAST)

lint: .venv/.test .types/flatcl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy does not know how a clone finds its parts. For it they lie in the package, as they do when it is installed.
.types/flatcl: $(wildcard flatcl/*.py)
	rm -rf $@
	mkdir -p $@
	ln -s $(addprefix ../../,$^ backbone datasets models utils) $@

docs: .venv/.run .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

bench: .venv/.run
	$(BIN)/python -m flatcl bench

gpu: .venv/.run
	$(BIN)/python -m flatcl gpu --out tests/records/gpu

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.run: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/.docs: .venv/bin/python docs/requirements.txt
	$(BIN)/python -m pip install --quiet -r docs/requirements.txt
	touch $@

.venv/.test: .venv/.run tests/requirements.txt docs/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@
