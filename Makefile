# make forwards to the command `recipe` and prints what it runs. make itself ends with 2 whatever went wrong; the
# exact exit code (75: stopped on request, run the same command to go on) stands in its "Error 75", and
# `.venv/bin/recipe` gives it directly.

MAIN_RECIPE := tinyllama-finetune
TEST_WORKERS ?= 2
OF_RUN := HW STEPS STOP_AT RESUME SET CONTAINER BUILD DRY OUT WORLD
PYTEST := .venv/bin/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal
FAST := tests/common tests/engines tests/tools tests/recipes tests/fuzz tests/writes tests/runs/test_tiny_run.py

# What users say on the command line reaches ci/*.sh as environment, letter for letter: $(value) keeps make from
# expanding a `$` in it, and no shell ever reads it as code. Only the first group is also taken from the
# environment; the others are names that shells and desktops use for themselves (WSL exports NAME).
FROM_ANYWHERE := HW CONTAINER PYTHON LAUNCHER TORCH_INDEX BASE_IMAGE WHEELHOUSE CA_BUNDLE
FROM_COMMAND_LINE := NAME RUN PORT BASE STEPS STOP_AT SET RESUME DRY OUT WORLD BUILD UPGRADE ROAD FAULT FROM DATA MAP ARGS PHASES EXPORTS N KILLS SEED HOURS ENGINE AT
hand_over = $(eval override $1 := $$(value $1))$(eval export $1)
$(foreach v,$(FROM_ANYWHERE),$(if $(filter-out undefined,$(origin $v)),$(call hand_over,$v)))
$(foreach v,$(FROM_COMMAND_LINE),$(if $(filter command,$(origin $v)),$(call hand_over,$v),$(eval unexport $v)))

.DEFAULT_GOAL := help
.PHONY: help setup recipe-finetune recipe-ddp recipe-scratch recipe new-recipe data serve do golden image image-verify test test-runs test-all fuzz test-processes test-containers rehearse torture lint docs bench lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  HW=cpu STEPS=20 SET="training_config.seed=1 eval_config.every=10" RESUME=never DRY=1 STOP_AT=10 OUT=folder'
	@echo '  Exact exit codes and every option: .venv/bin/recipe --help'

setup: ## make .venv (every other target does it first): PYTHON=python3.12, LAUNCHER=1 for a board's host
	@ci/setup.sh

recipe-finetune: setup ## fine-tune a small language model, evaluate and export it (HW= STEPS= SET= RESUME= DRY=1)
	@ci/forward.sh run $(MAIN_RECIPE) $(OF_RUN)

recipe-ddp: setup ## train on several devices, HW=n300 or HW=cpu-x2 (WORLD=4: so many; the variables above)
	@ci/forward.sh run ddp-n300 $(OF_RUN)

recipe-scratch: setup ## train a small transformer from random weights on Shakespeare (the same variables)
	@ci/forward.sh run nano-transformer-scratch $(OF_RUN)

recipe: setup ## run one recipe by name: NAME=tinyllama-finetune, and the variables above
	@: "$${NAME:?which recipe? make recipe NAME=$(MAIN_RECIPE)}"
	@ci/forward.sh run NAME $(OF_RUN)

new-recipe: setup ## a recipe for your data: NAME=support-tickets FROM=tinyllama-finetune DATA=my.csv MAP="prompt=question ..."
	@: "$${NAME:?what is it to be called? make new-recipe NAME=support-tickets FROM=$(MAIN_RECIPE) DATA=my.csv}"
	@FROM="$${FROM:-$(MAIN_RECIPE)}" ci/forward.sh new NAME FROM DATA MAP

data: setup ## build the data set of a recipe: NAME= (the fine-tuning recipe), HW=, SET=
	@NAME="$${NAME:-$(MAIN_RECIPE)}" ci/forward.sh data build NAME HW SET

serve: setup ## a trained run behind OpenAI's API and in a browser, on this CPU: RUN=runs/... BASE=1 (the untuned model beside it) PORT=8000; HW=n150: what would serve it there
	@: "$${RUN:?which run? make serve RUN=runs/...}"
	@ci/forward.sh serve RUN BASE PORT HW ROAD

do: setup ## any other verb of `recipe`: ARGS="doctor --hw n150", ARGS="grade runs/..."; without ARGS a list of them
	@ARGS="$${ARGS:---help}" ci/forward.sh ARGS

golden: setup ## the recipes' short runs on this CPU again, graded by their recorded figures: what CI runs; seconds
	.venv/bin/python -m ci.golden

image: setup ## build a board's image with docker buildx: HW=, BASE_IMAGE=, WHEELHOUSE=folder, CA_BUNDLE=file
	@BOARD="$${HW:-}" ci/forward.sh image build BASE_IMAGE WHEELHOUSE CA_BUNDLE BOARD

image-verify: setup ## build it twice and compare the layers; compare what it holds with the lock: the same variables
	@BOARD="$${HW:-}" ci/forward.sh image verify BASE_IMAGE WHEELHOUSE CA_BUNDLE BOARD

test: setup ## the fast tests, with one tiny run from data to export: within three minutes on two cores, no network
	$(PYTEST) -m "not slow" $(FAST)

test-runs: setup ## what trains whole runs, the pages and CI's own scripts; minutes, no network
	$(PYTEST) -m "not slow" tests/runs tests/ci tests/browser

test-all: setup ## every test, the slow ones too; with Python 3.10 or 3.12 here, also against the real ttnn (650 MB for each, once)
	FUZZ=2000 $(PYTEST) tests

fuzz: setup ## every parser with N inputs over all that nobody wrote (100000: half an hour); what fails is kept in tests/fuzz/seeds
	FUZZ="$${N:-100000}" $(PYTEST) tests/fuzz

test-processes: setup ## runs of several processes and hosts that are killed, stopped and resumed; two minutes
	.venv/bin/python -m pytest -q -n 1 tests/runs/test_data_parallel.py

test-containers: setup ## the tests that build and start containers; minutes, and a Docker engine (ci/engine.sh)
	.venv/bin/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m "not slow" tests/containers

rehearse: setup ## the hardware job of CI without a card, some minutes: HW=n300, FAULT=hung-step (a wrong one lists them), OUT=; ROAD=1: from a clone to a checkpoint
	.venv/bin/python -m ci.rehearse

torture: setup ## whole tiny trainings through kill -9, signals and power cuts, minutes: KILLS=1000 SEED=7 HOURS= ENGINE=cpu-x2 NAME= AT= FAULT=
	.venv/bin/python -m tests.torture

lint: setup ## formatting, lint and types; the Dockerfile, the workflows, YAML and shell
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	ci/typecheck-recipes.sh
	ci/tools.sh lint-imports
	ci/tools.sh hadolint docker/Dockerfile
	ci/tools.sh ci/lint-workflows.sh

docs: setup ## write the tables of the READMEs and docs/ from results.yaml and the code; RUN=runs/..., EXPORTS="runs/...": first what README.md and docs/exports.md show of runs
	.venv/bin/python -m ci.docs

bench: setup ## training and serving beside their peers (minutes; the peers get environments of their own); PHASES=1: where a run's time goes
ifeq ($(PHASES),1)
	.venv/bin/python -m bench.phases
	.venv/bin/python -m bench.phases --isa avx2
else
	.venv/bin/python bench/scratch.py
	.venv/bin/python bench/throughput.py
	.venv/bin/python -m bench.prefix
	.venv/bin/python -m bench.serving
endif

lock: ## make requirements/*.txt again from *.in, with hashes, then the pins of the images: UPGRADE=1 takes newer
	@ci/tools.sh python -m ci.lock
	@ci/setup.sh
	@ci/forward.sh lock UPGRADE
