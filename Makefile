# Everything works without make too: README.md has the plain commands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo minimind test check attack today stages engines docs lint types format clean help

demo: STARTED := $(shell date +%s)
demo: .venv/installed  ## data, pretraining, fine-tuning, a conversation, a report
	$(BIN)/python scripts/runs/demo.py --started $(STARTED)

minimind: .venv/installed  ## a chat model from real data; DATA=, MINUTES=, STAGES=, OUT=, PRICE=, FLAGS=
	bash scripts/runs/minimind.sh $(FLAGS)

test: .venv/installed-dev  ## all tests, files side by side
	$(BIN)/python -m pytest -n auto --dist loadfile

today: .venv/installed  ## the files that people have today, and those of 2025: do all stages work?
	$(BIN)/python benchmarks/today.py

stages: .venv/installed  ## does each stage learn? two to three hours on two cores
	$(BIN)/python benchmarks/learning/stages.py

engines: .venv/installed-dev  ## real engines and clients, each in its own environment: do they take what we make? ENGINES=
	$(BIN)/python tests/engines/run.py $(if $(ENGINES),--engine $(ENGINES))

attack: .venv/installed-dev  ## hostile files and requests, flipped bits, resumes, machines: all cases of tests/attack, 15 minutes
	ATTACK=1 $(BIN)/python -m pytest tests/attack

docs: .venv/installed-docs  ## these texts as a site, out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "to read it: $(BIN)/python -m http.server --directory out/site"

check: lint types  ## what to run before each commit: style, types, notes and the fast tests
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed-dev  ## style of code and notes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/check_notes.py

types: .venv/installed-dev  ## mypy over model, dataset, trainer: half a minute at first, then seconds
	$(BIN)/mypy

format: .venv/installed-dev  ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## what demo and tests made, and the environment; your own weights in out/ stay
	rm -rf .venv out/demo out/demo_report.json dataset/.cache *.egg-info .pytest_cache .ruff_cache .mypy_cache

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

# --no-compile: Python compiles what it imports by itself; to compile everything takes a minute
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -r requirements.txt
	@touch $@

.venv/installed-docs: requirements-docs.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-docs.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-eval.txt requirements-docs.txt .venv/installed
	$(BIN)/python -m pip install -q --no-compile -e '.[dev]'  # keeps the torch of requirements.txt
	@touch $@
