# make test    build .venv from requirements.lock if need be, then ruff and the tests
# make mutants  put defects into a copy of the program, one at a time: the tests must catch each (10 minutes)
# make fuzz    2,000 damaged files through the readers (5 minutes)
# make soak    the long runs behind docs/RELIABILITY.md: kills, restarts, many scans; about an hour
# make test-lowest  the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# make audit   known vulnerabilities of the lock (asks the index it was resolved from), and every licence
# make demo    build .venv, make phantoms, project them with the shipped model, write demos/out/report.html
# make bench   speed and memory of every job against the plain reference path, on this machine: runs/bench/speed.json
# make bench-gpu  on a GPU: the kernels checked, then the GPU rows of the table, each in under ten minutes
# make lock    resolve pyproject.toml into requirements.lock again
# make clean   remove .venv and caches; runs, results and models stay
#
# Needs Python 3.11 to 3.13 (with venv and pip), gcc and make. Another interpreter: make test PYTHON=/path/to/python

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
TWO := --numprocesses 2 --dist loadfile      # of the tests; a file's share what they set up

.PHONY: test mutants fuzz soak test-lowest audit demo bench bench-gpu venv lock clean

test: venv
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(TWO)

mutants: venv
	$(BIN)/python tests/mutations.py

fuzz: venv
	$(BIN)/python -m pytest -m fuzz tests/test_fuzz.py

soak: venv
	$(BIN)/python -m pytest -m soak -s

test-lowest:
	tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && \
	$(PYTHON) -m venv $$tool && $$tool/bin/python -m pip install --quiet 'uv>=0.9' && \
	$$tool/bin/uv venv --quiet --clear --python $(PYTHON) .venv-lowest && \
	$$tool/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--requirement pyproject.toml --extra test --extra demos
	.venv-lowest/bin/python -m pytest $(TWO)

# --strict: a package that no database knows is an error, not a pass
audit: venv
	tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && \
	$(PYTHON) -m venv $$tool && $$tool/bin/python -m pip install --quiet pip-audit pip-licenses && \
	$$tool/bin/pip-licenses --python=$(BIN)/python --from=mixed --order=license && \
	$$tool/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

demo: venv
	$(BIN)/python demos/demo.py

bench: venv
	$(BIN)/python -m benchmarks.speed --out runs/bench/speed.json

bench-gpu: venv
	sh benchmarks/gpu_session.sh check
	for rows in median512,styled512,ops512 ct256 projection512 paper512; do \
		sh benchmarks/gpu_session.sh table $$rows || exit 1; done

venv: $(STAMP)

$(STAMP): requirements.lock
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 on the path; install Python 3.11 (with venv)," \
		"or name one: make test PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "make: expected Python 3.11 to 3.13, found $$($(PYTHON) --version 2>&1) ($(PYTHON)); install Python 3.11," \
		"or name one: make test PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--require-hashes --requirement requirements.lock
	touch $@

# Versions in the present lock are kept where the ranges allow: `make lock UPGRADE=--upgrade` takes the newest.
# Universal: one lock for every Python and platform that pyproject.toml allows.
lock:
	tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && \
	$(PYTHON) -m venv $$tool && $$tool/bin/python -m pip install --quiet 'uv>=0.9' && \
	$$tool/bin/uv pip compile pyproject.toml --extra test --extra tensorboard --extra demos $(UPGRADE) --quiet \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command 'make lock' --output-file requirements.lock

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
