# Everything a user or CI types. Needs python3 >= 3.11 (with venv) and make; all else is installed into .venv by uv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# uv writes byte code at installation: without it every Ray worker would compile each module again.
export UV_COMPILE_BYTECODE := 1
export UV_NO_PROGRESS := 1
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-faults check format install lock bench test-lowest clean

demo: $(INSTALLED)  ## prepare, sweep, track, evaluate, compare, promote, search: the main job on embedded data
	@$(BIN)/setwise demo

test: $(INSTALLED)  ## install and run every test but the longest of faults
	@$(BIN)/python -m pytest $(TWO) -m "not long"

test-faults: $(INSTALLED)  ## inject every fault for real; prints one line a fault: injected, recovered, lost
	@SETWISE_CHAOS_KILLS=10 $(BIN)/python -m pytest -q tests/faults

check: $(INSTALLED) .typecheck  ## lint, formatting, strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p setwise

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setwise needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Installing into .venv (about 6 GB with the GPU libraries of torch; once)..." >&2
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# mypy and editors cannot follow the editable install's import hook; four links give them the real tree.
.typecheck:
	@mkdir -p .typecheck/setwise
	@for folder in platform models pipelines sweeps; do ln -sfn ../../$$folder .typecheck/setwise/$$folder; done

bench: $(INSTALLED)  ## speed and memory, side by side with plain formulations; prints tables, about twenty minutes
	@status=0; for file in tests/benchmarks/*.py; do \
	  name=$$(basename $$file .py); echo "== $$name"; PYTHONPATH=tests $(BIN)/python -m benchmarks.$$name || status=1; \
	done; exit $$status

lock: $(INSTALLED)  ## resolve the newest versions that pyproject.toml allows into requirements.lock
	@$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements.lock

test-lowest:  ## the tests again, with the oldest versions that pyproject.toml allows
	@test -x $(BIN)/uv || $(MAKE) install
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	@.venv-lowest/bin/python -m pytest $(TWO)

clean:  ## remove what was installed; data, runs and studies in .setwise stay
	rm -rf .venv .venv-lowest .typecheck build ./*.egg-info
