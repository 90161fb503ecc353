# make forwards to the command `recipe` and prints what it runs. make itself ends with 2 whatever went wrong; the
# exact exit code (75: stopped on request, run the same command to go on) stands in its "Error 75", and
# `.venv/bin/recipe` gives it directly.

MAIN_RECIPE := tinyllama-finetune
TEST_WORKERS ?= 2
PYTEST := .venv/bin/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal

# What users say on the command line reaches ci/*.sh as environment, letter for letter: $(value) keeps make from
# expanding a `$` in it, and no shell ever reads it as code. Only the first group is also taken from the
# environment; the others are names that shells and desktops use for themselves (WSL exports NAME).
FROM_ANYWHERE := HW CONTAINER PYTHON LAUNCHER TORCH_INDEX BASE_IMAGE WHEELHOUSE CA_BUNDLE
FROM_COMMAND_LINE := NAME RUN RUNS STEPS STOP_AT SET RESUME DRY OUT WORLD DDP WEAK PROMPT BASE CHECK UPGRADE RECORD CALIBRATE FAULT FROM DATA MAP
hand_over = $(eval override $1 := $$(value $1))$(eval export $1)
$(foreach v,$(FROM_ANYWHERE),$(if $(filter-out undefined,$(origin $v)),$(call hand_over,$v)))
$(foreach v,$(FROM_COMMAND_LINE),$(if $(filter command,$(origin $v)),$(call hand_over,$v),$(eval unexport $v)))

.DEFAULT_GOAL := help
.PHONY: help setup recipe-finetune recipe-ddp recipe-scratch recipe new-recipe data generate report compare export doctor stop plan verify grade golden repro image image-verify test test-all test-processes test-containers rehearse lint docs bench lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  HW=cpu STEPS=20 SET="training_config.seed=1 eval_config.every=10" RESUME=never DRY=1 STOP_AT=10 OUT=folder'
	@echo '  Exact exit codes and every option: .venv/bin/recipe --help'

setup: ## make .venv (every other target does it first): PYTHON=python3.12, LAUNCHER=1 for a board's host
	@ci/setup.sh

recipe-finetune: setup ## fine-tune a small language model, evaluate and export it (HW= STEPS= SET= RESUME= DRY=1)
	@ci/forward.sh run $(MAIN_RECIPE)

recipe-ddp: setup ## train on several devices, HW=n300 or HW=cpu-x2 (WORLD=4: so many; the variables above)
	@ci/forward.sh run ddp-n300

recipe-scratch: setup ## train a small transformer from random weights on Shakespeare (the same variables)
	@ci/forward.sh run nano-transformer-scratch

recipe: setup ## run one recipe by name: NAME=tinyllama-finetune, and the variables above
	@: "$${NAME:?which recipe? make recipe NAME=$(MAIN_RECIPE)}"
	@ci/forward.sh run "$$NAME"

new-recipe: setup ## a recipe for your data: NAME=support-tickets FROM=tinyllama-finetune DATA=my.csv MAP="prompt=question ..."
	@: "$${NAME:?what is it to be called? make new-recipe NAME=support-tickets FROM=$(MAIN_RECIPE) DATA=my.csv}"
	@FROM="$${FROM:-$(MAIN_RECIPE)}" ci/forward.sh new "$$NAME"

data: setup ## build the data set of a recipe: NAME= (the fine-tuning recipe), HW=, SET=
	@ci/forward.sh data build "$${NAME:-$(MAIN_RECIPE)}"

generate: setup ## talk to a trained model: RUN=runs/..., PROMPT="a question", BASE=1 to see the untuned answer too
	@: "$${RUN:?which run? make generate RUN=runs/...}"
	@ci/forward.sh generate "$$RUN"

report: setup ## write the page over all runs, or with RUN=runs/... that run's: OUT=
	@ci/forward.sh report $${RUN:+"$$RUN"}

compare: setup ## compare runs, and draw runs/compare.html: RUNS="runs/... runs/..."
	@: "$${RUNS:?which runs? make compare RUNS='runs/... runs/...'}"
	@ci/forward.sh runs compare --html runs/compare.html

export: setup ## write a run's Hugging Face folder and check it: RUN=runs/...
	@: "$${RUN:?which run? make export RUN=runs/...}"
	@ci/forward.sh export "$$RUN"

doctor: setup ## what is wrong with this machine for a board: nodes, driver, firmware, memory, engine, locks: HW=
	@ci/forward.sh doctor

stop: setup ## end a run on this machine, which saves a checkpoint first: HW= or RUN= where several go on
	@ci/forward.sh stop $${RUN:+"$$RUN"}

plan: setup ## what a run would need, before it starts: NAME= (the fine-tuning recipe), HW=, STEPS=, SET=
	@ci/forward.sh plan "$${NAME:-$(MAIN_RECIPE)}"

verify: setup ## RUN=runs/...: does the run hold together; CALIBRATE=1: can that fail; HW=: is the board right; DDP=1, NAME=, WEAK=1
	@ci/forward.sh verify

grade: setup ## hold a run against the recorded figures of its training: RUN=runs/..., RECORD=1 writes them
	@: "$${RUN:?which run? make grade RUN=runs/...}"
	@ci/forward.sh grade "$$RUN"

golden: setup ## the recipes' short runs on this CPU again, graded by their recorded figures: what CI runs; seconds
	.venv/bin/python -m ci.golden

repro: setup ## run a run again from its manifest and compare the two: RUN=runs/...
	@: "$${RUN:?which run? make repro RUN=runs/...}"
	@ci/forward.sh repro "$$RUN"

image: setup ## build a board's image with docker buildx: HW=, BASE_IMAGE=, WHEELHOUSE=folder, CA_BUNDLE=file
	@ci/forward.sh image build

image-verify: setup ## build it twice and compare the layers; compare what it holds with the lock: the same variables
	@ci/forward.sh image verify

test: setup ## the tests, with one tiny run from data to export; some seven minutes on two cores, no network
	$(PYTEST) -m "not slow" tests

test-all: setup ## the slow tests too; with Python 3.10 or 3.12 here, also against the real ttnn (650 MB for each, once)
	$(PYTEST) tests

test-processes: setup ## runs of several processes and hosts that are killed, stopped and resumed; two minutes
	.venv/bin/python -m pytest -q -n 1 tests/runs/test_data_parallel.py

test-containers: setup ## the tests that build and start containers; minutes, and a Docker engine (ci/engine.sh)
	.venv/bin/python -m pytest -q -m "not slow" tests/containers

rehearse: setup ## the hardware job of CI without a card, some minutes: HW=n300, FAULT=hung-step (a wrong one lists them), OUT=
	.venv/bin/python -m ci.rehearse

lint: setup ## formatting, lint and types; the Dockerfile, the workflows, YAML and shell
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	ci/typecheck-recipes.sh
	ci/tools.sh hadolint docker/Dockerfile
	ci/tools.sh ci/lint-workflows.sh

docs: setup ## write the tables of the READMEs from each recipe's results.yaml
	.venv/bin/python -m ci.docs

bench: setup ## throughput beside a peer's trainer and a bare loop (minutes; the peer gets its own environment)
	.venv/bin/python bench/scratch.py
	.venv/bin/python bench/throughput.py

lock: ## make requirements/*.txt again from *.in, with hashes, then the pins of the images: UPGRADE=1 takes newer
	@ci/tools.sh python ci/lock.py
	@ci/setup.sh
	@ci/forward.sh lock
