# Everything a person does with this project, by name. `make` alone lists it.
# Works from any folder (make -C DIR), with spaces in the path; proxies, certificates and package
# settings of the caller's environment are left as they are.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
UV_VERSION := 0.13.9
# What puts the locked packages into .venv; INSTALL='.venv/bin/python -m pip install' does it with pip alone.
INSTALL ?= $(BIN)/uv pip install
# Bytecode is written once, when packages are installed: a process then starts in a third of the time, also where it may not write any.
export UV_COMPILE_BYTECODE := 1
# Which interpreter .venv is made of, when it should not be the first Python 3.11 that is found.
PYTHON ?=
# `make lock UPGRADE=--upgrade` moves every pin, UPGRADE='--upgrade-package numpy' one.
UPGRADE ?=
PYTEST := $(BIN)/python -m pytest
# pytest leaves with 5 when no test carries the mark, which is no failure.
OR_NONE := || [ $$? -eq 5 ]
# Chapters of experts and pools that a model has on request only, and of timings: proved with the tests of services. A plain `nbdev_test` runs all.
LATER := (22b_text_transformer|23b_applications|23c_finetune|24a_pools|55_bench)\.ipynb
PORT ?= 8000
MLFLOW_PORT ?= 5000
# Images: which engine (docker, podman or buildah; else the first that answers), over which Python image, with which further
# flags of its `build`; `make up PROFILE=full` starts PostgreSQL and Redis too.
CONTAINER ?=
BASE_IMAGE ?=
BUILD_FLAGS ?=
PROFILE ?=

# Commands of .venv call one another by name: DVC calls rakuten-nb, git calls nbdev_merge.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# Nobody is told what is run here.
export MLFLOW_DISABLE_TELEMETRY := true
export BENTOML_DO_NOT_TRACK := True
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export ORT_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# --- run it

.PHONY: demo
demo: .venv/.installed ## from nothing to predictions on the synthetic sample, and what to type next
	@$(BIN)/dvc repro
	@$(BIN)/python -m rakuten_nb.cli summary

.PHONY: serve
serve: .venv/.installed ## the API on 127.0.0.1:8000 (PORT=…), jobs included, with the model in models/bundle; writes a SECRET_KEY into .env if there is none
	@RAKUTEN_EMBEDDED_WORKER=$${RAKUTEN_EMBEDDED_WORKER:-true} $(BIN)/rakuten-nb serve --make-secret --port $(PORT)

.PHONY: mlflow
mlflow: .venv/.installed ## runs and registered models in a browser, on 127.0.0.1:5000 (MLFLOW_PORT=…)
	@echo "http://127.0.0.1:$(MLFLOW_PORT) shows mlflow.db; Ctrl-C ends it"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1

.PHONY: lab
lab: .venv/.installed ## the notebooks in JupyterLab; a saved notebook is cleaned at once
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter nbs

# Of an experiment: the parameters that differ, and the fused figures out of fold, by which one chooses.
.PHONY: experiments
experiments: .venv/.installed ## the experiments since the last commit, the best first
	@$(BIN)/dvc exp show --only-changed --sort-by metrics/out_of_fold.json:fused.weighted_f1 --sort-order desc \
	  --drop 'Created|State|Executor|metrics/(gold|out_of_fold\.json:experts)|.*(accuracy|top3|ece|rows|\.n$$)|(models|data|rakuten_nb|reports)/|metrics/[a-z_]+\.json$$'

.PHONY: data-push
data-push: .venv/.installed ## send data and models, as dvc.lock names them, to RAKUTEN_REMOTE_URL (and DagsHub, where it is set)
	@$(BIN)/rakuten-nb data push

.PHONY: data-pull
data-pull: .venv/.installed ## fetch what dvc.lock names from there
	@$(BIN)/rakuten-nb data pull

# --- run it in containers

# Leaves the engine in $engine: a docker command without a daemon behind it is none.
find_engine = engine="$(CONTAINER)"; \
  if [ -z "$$engine" ]; then \
    if docker info >/dev/null 2>&1; then engine=docker; \
    else for known in podman buildah; do if [ -z "$$engine" ] && command -v $$known >/dev/null; then engine=$$known; fi; done; fi; \
  fi; \
  command -v "$$engine" >/dev/null || { echo "make $@: no container engine: start Docker, or install podman or buildah" >&2; exit 1; }

# Without --format docker, Podman and Buildah drop the health check.
build_image = $(find_engine); \
  case $$engine in *docker) set --;; *) set -- --format docker --layers;; esac; \
  "$$engine" build "$$@" --file deploy/docker/Dockerfile --target $(1) --tag rakuten-nb-$(1):local \
    $(if $(BASE_IMAGE),--build-arg PYTHON_IMAGE="$(BASE_IMAGE)") --build-arg VERSION="$$(sed -n 's/^version *= *//p' settings.ini)" \
    --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" $(BUILD_FLAGS) .

# Leaves the command for compose.yaml in $compose.
find_compose = $(find_engine); \
  if [ "$$engine" = docker ]; then compose="docker compose"; \
  elif command -v podman-compose >/dev/null; then compose=podman-compose; \
  else compose="podman compose"; fi; \
  $$compose version >/dev/null 2>&1 || { echo "make $@: '$$compose' is missing: install Docker's compose plugin or podman-compose" >&2; exit 1; }

# A setting that must have a value, in .env or in the environment.
is_set = { [ -n "$${$(1):-}" ] || grep -Eqs '^(export )?$(1)=.' .env; }

.PHONY: image-serve
image-serve: ## the image that serves; CONTAINER=podman, BASE_IMAGE=… and BUILD_FLAGS=… are passed on
	@$(call build_image,serve)

.PHONY: image-train
image-train: ## the image that trains and runs the pipeline; the same variables
	@$(call build_image,train)

.PHONY: up
up: ## the API in a container on 127.0.0.1:8000; PROFILE=full puts it on PostgreSQL and Redis
	@$(call is_set,SECRET_KEY) || { echo "make up: no SECRET_KEY in .env: \`make serve\` writes one there" >&2; exit 1; }
	@[ -z "$(filter full,$(PROFILE))" ] || { $(call is_set,POSTGRES_PASSWORD) && $(call is_set,REDIS_PASSWORD); } || \
	  { echo "make up: PROFILE=full needs POSTGRES_PASSWORD and REDIS_PASSWORD in .env" >&2; exit 1; }
	@[ -f models/bundle/bundle.json ] || { echo "make up: no model in models/bundle: \`make demo\` makes one" >&2; exit 1; }
	@$(find_compose)
	@$(call build_image,serve)
	@$(find_compose); $$compose $(addprefix --profile ,$(PROFILE)) up -d --no-build && \
	  echo "soon on http://127.0.0.1:$${RAKUTEN_PORT:-8000}; /ready says when"

.PHONY: down
down: ## stop the containers; the volumes with users, predictions and database stay
	@$(find_compose); SECRET_KEY=unused $$compose --profile full --profile train down

# --- judge it

.PHONY: test
test: .venv/.installed ## the notebooks, then every fast test; names what a skipped test lacks
	@$(BIN)/nbdev_test --timing --skip_file_re '^[_.]|^$(LATER)'; notebooks=$$?; \
	$(PYTEST) -m fast -n auto; tests=$$?; \
	[ $$notebooks -eq 0 ] || echo "make test: notebooks failed, see above"; \
	exit $$((notebooks + tests))

.PHONY: test-services
test-services: .venv/.installed ## tests that start a database, a broker, a registry, a queue of experiments; the slowest notebooks
	@$(BIN)/nbdev_test --timing --file_re '^$(LATER)'; notebooks=$$?; \
	$(PYTEST) -m services -n auto --dist loadfile; tests=$$?; \
	[ $$tests -ne 5 ] || tests=0; \
	[ $$notebooks -eq 0 ] || echo "make test-services: notebooks failed, see above"; \
	exit $$((notebooks + tests))

.PHONY: test-all
test-all: test test-services .venv/.installed ## the same and the heavy tests
	@$(PYTEST) -m heavy $(OR_NONE)

.PHONY: lint
lint: .venv/.installed ## ruff over the Python files and the order of imports in the notebooks, mypy over the package, the schemas of workflows and compose.yaml
	@$(BIN)/ruff check rakuten_nb tests tools setup.py
	@$(BIN)/ruff check --select I nbs
	@$(BIN)/mypy
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml

# --- write it

.PHONY: export
export: .venv/.installed ## notebooks to package, then clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

.PHONY: readme
readme: .venv/.installed ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

.PHONY: docs
docs: .venv/.installed ## the documentation site in _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs: quarto is not installed; see https://quarto.org/docs/get-started/"; exit 1; }
	@rm -rf _proc && $(BIN)/nbdev_docs
	@$(BIN)/python tools/readme.py

.PHONY: hooks
hooks: .venv/.installed ## nbdev's git and Jupyter hooks: notebooks merge and save clean
	@$(BIN)/nbdev_install_hooks

.PHONY: lock
lock: .venv/.installed ## requirements/*.txt from settings.ini; UPGRADE=--upgrade moves the pins
	@set -e; compile() { name=$$1; shift; echo "requirements/$$name.txt"; \
	  $(BIN)/uv pip compile setup.py --quiet --python-version 3.11 --no-header --no-annotate --strip-extras \
	    --no-emit-index-url --no-emit-find-links --override requirements/overrides.txt --output-file "requirements/$$name.txt" "$$@"; }; \
	touch setup.py; `# or uv goes by what it read from it before settings.ini changed` \
	compile all --all-extras $(UPGRADE); \
	set -- --constraint requirements/all.txt --upgrade; \
	compile serve "$$@"; \
	compile dev --extra train --extra lite2 --extra pretrained --extra transformer --extra bento --extra dev "$$@"; \
	compile bento --extra bento "$$@"; \
	compile ops --extra ops "$$@"; \
	compile scale --extra scale "$$@"

# --- tidy up

.PHONY: clean
clean: ## remove what running made, models and reports included; keep .venv, the logs and DVC's cache
	@rm -rf data/raw data/preprocessed data/predictions models metrics reports
	@rm -rf _docs _proc nbs/_docs nbs/nbdev.yml nbs/.last_checked build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find nbs rakuten_nb tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove everything that git does not keep, but for .env, data/ and logs/
	@rm -rf .venv .dvc/cache .dvc/tmp *.egg-info

# --- the environment: one .venv at the root, for the demo, the tests and JupyterLab

.venv/.installed: requirements/dev.txt settings.ini setup.py
	@set -e; found=""; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	[ -n "$$found" ] || { echo "make: Python 3.11 is missing (Debian package: python3.11); PYTHON=/path/to/python3.11 names one elsewhere" >&2; exit 1; }; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	  "$$found" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $$found cannot make environments (Debian package: python3.11-venv)" >&2; exit 1; }; \
	  echo "making .venv with $$("$$found" --version)"; \
	  "$$found" -m venv --clear .venv; \
	fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "installing $$(grep -c == requirements/dev.txt) locked packages"
	@$(INSTALL) --quiet --no-deps -r requirements/dev.txt
	@$(INSTALL) --quiet --no-deps --no-build-isolation -e .
	@if [ -e .git ] && command -v git >/dev/null; then git config --local include.path ../.gitconfig 2>/dev/null || true; fi
	@touch $@
