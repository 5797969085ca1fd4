# The things one can do here. All but the demo use a virtual environment of their own, .venv, built when it is missing
# or older than pyproject.toml.

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

help:
	@echo 'make demo    run a small queue in a temporary folder; needs nothing but python3'
	@echo 'make test    run the tests'
	@echo 'make soak    kill pollers at random for SECONDS=600 and look for what is lost'
	@echo 'make bench   measure how fast it is, beside xargs and others that are here'
	@echo 'make lint    run ruff and mypy'
	@echo 'make build   make the wheel and the sdist, in dist/'
	@echo 'make clean   remove what the others made'

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'make: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv'; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]' build
	touch $@

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 4

soak: $(VENV)/ready
	SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest -m soak

bench: $(VENV)/ready
	$(BIN)/python -m pytest -q -m bench

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

build: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build

# Six scripts, of which one fails, on the GPUs if there are any, else on two plain slots.
demo:
	@set -eu; q=$$(mktemp -d); mkdir "$$q/to_run"; \
	for name in 1-count 2-primes 3-sleep 4-broken 5-hello 6-where; do \
	    case $$name in \
	    1-count) body='seq 1 5' ;; \
	    2-primes) body='factor 97 98 99' ;; \
	    3-sleep) body='sleep 1; echo rested' ;; \
	    4-broken) body='echo "no such data set" >&2; exit 3' ;; \
	    5-hello) body='sleep 0.5; echo "hello from GPU or slot $$FASTGPU_ID"' ;; \
	    6-where) body='echo "on $$(uname -n), as process $$$$"' ;; \
	    esac; \
	    printf '#!/bin/sh\n%s\n' "$$body" >"$$q/to_run/$$name.sh"; \
	    chmod +x "$$q/to_run/$$name.sh"; \
	done; \
	if nvidia-smi -L >/dev/null 2>&1 && $(PYTHON) -c 'import pynvml' 2>/dev/null; then options=; \
	else options='--workers 2'; fi; \
	echo "$$ fastgpu_poll --path $$q $$options"; \
	$(PYTHON) fastgpu.py --path "$$q" $$options || echo "(exit status $$?)"; \
	for folder in to_run running complete fail; do echo "$$ ls $$q/$$folder"; ls "$$q/$$folder"; done; \
	echo "$$ cat $$q/out/5-hello.sh.stdout"; cat "$$q/out/5-hello.sh.stdout"; \
	echo "$$ cat $$q/out/4-broken.sh.stderr"; cat "$$q/out/4-broken.sh.stderr"; \
	echo "(the queue is left in $$q)"

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__

.PHONY: help test soak bench lint build demo clean
