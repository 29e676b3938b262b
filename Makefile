# All tasks of the project; `make` without a target lists them. Works from any folder (make -C DIR) and with spaces in
# the path. Proxy, certificate and package settings of the environment apply unchanged.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
UV_VERSION := 0.13.9
# Command that installs the locked packages; INSTALL='.venv/bin/python -m pip install' uses pip instead of uv.
INSTALL ?= $(BIN)/uv pip install
# Compile packages when they are installed: a process then starts in a third of the time, even on a read-only disk.
export UV_COMPILE_BYTECODE := 1
# Interpreter for .venv; by default the first Python 3.11 on PATH.
PYTHON ?=
# `make lock UPGRADE=--upgrade` updates all pins, UPGRADE='--upgrade-package numpy' one.
UPGRADE ?=
PYTEST := $(BIN)/python -m pytest
# pytest exits with 5 if no test has the mark; that is not a failure.
OR_NONE := || [ $$? -eq 5 ]
# Notebooks of optional experts, baselines, simulations and timings run with the services tests. A plain `nbdev_test` runs all.
LATER := (40_text_transformer|45_applications|70_image_tuned|60_pooling_baselines|70_estimates|75_abtest|80_drift_tests|20_bench|25_bench_shadow)\.ipynb
PORT ?= 8000
MLFLOW_PORT ?= 5000
# Containers: engine (docker, podman or buildah; by default the first that works), base image, further flags of `build`.
# `make up PROFILE=full` also starts PostgreSQL and Redis.
CONTAINER ?=
BASE_IMAGE ?=
BUILD_FLAGS ?=
PROFILE ?=

# Commands of .venv call each other by name: DVC calls rakuten-nb, git calls nbdev_merge.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# No telemetry.
export MLFLOW_DISABLE_TELEMETRY := true
export BENTOML_DO_NOT_TRACK := True
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export ORT_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# --- run it

.PHONY: demo
demo: .venv/.installed ## run the whole pipeline on the synthetic sample: metrics, predictions, next steps
	@$(BIN)/dvc repro
	@$(BIN)/python -m rakuten_nb.cli summary

.PHONY: serve
serve: .venv/.installed ## serve the API with models/bundle on 127.0.0.1:8000 (PORT=…), jobs included; writes SECRET_KEY into .env if missing
	@RAKUTEN_EMBEDDED_WORKER=$${RAKUTEN_EMBEDDED_WORKER:-true} $(BIN)/rakuten-nb serve --make-secret --port $(PORT)

.PHONY: mlflow
mlflow: .venv/.installed ## show runs and registered models on 127.0.0.1:5000 (MLFLOW_PORT=…)
	@test -f mlflow.db || $(BIN)/rakuten-nb model list
	@echo "http://127.0.0.1:$(MLFLOW_PORT) shows mlflow.db; Ctrl-C stops it"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1

.PHONY: lab
lab: .venv/.installed ## open the notebooks in JupyterLab; they are cleaned when saved
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter nbs

# For each experiment: the parameters that differ and the fused metrics out of fold, the ones to choose by.
.PHONY: experiments
experiments: .venv/.installed ## list the experiments since the last commit, best first
	@$(BIN)/dvc exp show --only-changed --sort-by metrics/out_of_fold.json:fused.weighted_f1 --sort-order desc \
	  --drop 'Created|State|Executor|metrics/(gold|out_of_fold\.json:experts)|.*(accuracy|top3|ece|rows|\.n$$)|(models|data|rakuten_nb|reports)/|metrics/[a-z_]+\.json$$'

.PHONY: data-push
data-push: .venv/.installed ## upload the data and models of dvc.lock to RAKUTEN_REMOTE_URL (and DagsHub, if set)
	@$(BIN)/rakuten-nb data push

.PHONY: data-pull
data-pull: .venv/.installed ## download the data and models of dvc.lock from there
	@$(BIN)/rakuten-nb data pull

# --- run it in containers

# Sets $engine. A docker command without a running daemon does not count.
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

# Sets $compose, the command for compose.yaml.
find_compose = $(find_engine); \
  if [ "$$engine" = docker ]; then compose="docker compose"; \
  elif command -v podman-compose >/dev/null; then compose=podman-compose; \
  else compose="podman compose"; fi; \
  $$compose version >/dev/null 2>&1 || { echo "make $@: '$$compose' is missing: install Docker's compose plugin or podman-compose" >&2; exit 1; }

# Whether a setting has a value in .env or the environment.
is_set = { [ -n "$${$(1):-}" ] || grep -Eqs '^(export )?$(1)=.' .env; }

.PHONY: image-serve
image-serve: ## build the image of the API; CONTAINER=podman, BASE_IMAGE=… and BUILD_FLAGS=… are passed on
	@$(call build_image,serve)

.PHONY: image-train
image-train: ## build the image for training and the pipeline; same variables
	@$(call build_image,train)

.PHONY: up
up: ## start the API in a container on 127.0.0.1:8000; PROFILE=full adds PostgreSQL and Redis
	@$(call is_set,SECRET_KEY) || { echo "make up: no SECRET_KEY in .env: \`make serve\` writes one there" >&2; exit 1; }
	@[ -z "$(filter full,$(PROFILE))" ] || { $(call is_set,POSTGRES_PASSWORD) && $(call is_set,REDIS_PASSWORD); } || \
	  { echo "make up: PROFILE=full needs POSTGRES_PASSWORD and REDIS_PASSWORD in .env" >&2; exit 1; }
	@[ -f models/bundle/bundle.json ] || { echo "make up: no model in models/bundle: \`make demo\` makes one" >&2; exit 1; }
	@$(find_compose)
	@$(call build_image,serve)
	@$(find_compose); $$compose $(addprefix --profile ,$(PROFILE)) up -d --no-build && \
	  echo "starting on http://127.0.0.1:$${RAKUTEN_PORT:-8000}; /ready answers 200 once a model is loaded"

.PHONY: down
down: ## stop the containers; volumes (users, predictions, database) stay
	@$(find_compose); SECRET_KEY=unused $$compose --profile full --profile train down

# --- test it

.PHONY: test
test: .venv/.installed ## run the notebooks and all fast tests; lists missing system packages of skipped tests
	@$(BIN)/nbdev_test --timing --skip_file_re '^[_.]|^$(LATER)'; notebooks=$$?; \
	$(PYTEST) -m fast -n auto; tests=$$?; \
	[ $$notebooks -eq 0 ] || echo "make test: notebooks failed, see above"; \
	exit $$((notebooks + tests))

.PHONY: test-services
test-services: .venv/.installed ## run the tests that start databases, registries and queues, and the slowest notebooks
	@$(BIN)/nbdev_test --timing --file_re '^$(LATER)'; notebooks=$$?; \
	$(PYTEST) -m services -n auto --dist loadfile; tests=$$?; \
	[ $$tests -ne 5 ] || tests=0; \
	[ $$notebooks -eq 0 ] || echo "make test-services: notebooks failed, see above"; \
	exit $$((notebooks + tests))

.PHONY: test-all
test-all: test test-services .venv/.installed ## run all tests, heavy ones included
	@$(PYTEST) -m heavy $(OR_NONE)

.PHONY: lint
lint: .venv/.installed ## check code style, types, prose, and the schemas of workflows and compose.yaml
	@$(BIN)/ruff check rakuten_nb tests tools setup.py
	@$(BIN)/ruff check --select E501,I nbs
	@$(BIN)/mypy
	@$(BIN)/python tools/prose.py
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml

# --- write it

.PHONY: export
export: .venv/.installed ## write the package from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

.PHONY: readme
readme: .venv/.installed ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

.PHONY: docs
docs: .venv/.installed ## build the documentation site in _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs: quarto is not installed; see https://quarto.org/docs/get-started/"; exit 1; }
	@rm -rf _proc && $(BIN)/nbdev_docs
	@$(BIN)/python tools/readme.py

.PHONY: hooks
hooks: .venv/.installed ## install the git and Jupyter hooks of nbdev: clean merges and saves
	@$(BIN)/nbdev_install_hooks

.PHONY: lock
lock: .venv/.installed ## write requirements/*.txt from settings.ini; UPGRADE=--upgrade updates the pins
	@set -e; compile() { name=$$1; shift; echo "requirements/$$name.txt"; \
	  $(BIN)/uv pip compile setup.py --quiet --python-version 3.11 --no-header --no-annotate --strip-extras \
	    --no-emit-index-url --no-emit-find-links --override requirements/overrides.txt --output-file "requirements/$$name.txt" "$$@"; }; \
	touch setup.py; `# otherwise uv uses what it cached before settings.ini changed` \
	compile all --all-extras $(UPGRADE); \
	set -- --constraint requirements/all.txt --upgrade; \
	compile serve "$$@"; \
	compile dev --extra train --extra lite2 --extra pretrained --extra transformer --extra bento --extra dev "$$@"; \
	compile bento --extra bento "$$@"; \
	compile ops --extra ops "$$@"; \
	compile scale --extra scale "$$@"

# --- tidy up

.PHONY: clean
clean: ## remove generated files, models and reports included; .venv, logs and the DVC cache stay
	@rm -rf data/raw data/preprocessed data/predictions models metrics reports
	@rm -rf _docs _proc nbs/_docs nbs/nbdev.yml nbs/.last_checked build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find nbs rakuten_nb tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove everything that git ignores, except .env, data/ and logs/
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
