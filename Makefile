# demur: `make demo` shows it, `make test` checks it. Both install what is missing into .venv.

PYTHON ?= python3.11
# Where the CPU build of torch comes from if pip's own sources have none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0+cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready
INPUTS := requirements/cpu.txt pyproject.toml clients/pyproject.toml Makefile drafts/passes.c

.PHONY: setup demo serve test test-fast lint docker-lint format bench lock openapi drafts clean

setup: $(READY)
	@echo "setup: .venv is up to date"

$(READY): $(INPUTS)
	@echo "setup 1/4: virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup 2/4: $(TORCH)"
	@$(PIP) install --no-deps $(TORCH) || \
		{ echo "setup: not among pip's own sources; taking it from $(TORCH_INDEX)"; \
		  $(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH); }
	@echo "setup 3/4: the pinned packages of requirements/cpu.txt (about 1 GB; minutes)"
	@$(PIP) install --no-deps -r requirements/cpu.txt
	@echo "setup 4/4: demur and demur-server, editable"
	@# By path: a folder that happens to be called demur, as the clone may be, does not hide it then.
	@$(PIP) install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat \
		-e clients -e .
	@touch $@

demo: setup
	@$(BIN)/demur demo

serve: setup
	@$(BIN)/demur init
	@$(BIN)/demur serve

# Two workers: while one waits for an engine to start, the other computes.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST)

# Without the tests that start a vLLM engine.
test-fast: setup
	@$(PYTEST) -m "not engine"

lint: setup docker-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docker-lint: setup
	@$(BIN)/hadolint docker/*.Dockerfile

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/python benchmarks/score_throughput.py

COMPILE = $(BIN)/uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-emit-package demur --no-emit-package demur-server --no-header --no-annotate --quiet
CPU_BUILD = --override requirements/overrides.txt --find-links .venv/wheels --no-emit-package torch

# Resolves the pins again. Needs the network and takes whatever is newest within pyproject's bounds.
lock: setup
	@$(PIP) install --quiet uv==0.13.*
	@$(PIP) download --quiet --no-deps --dest .venv/wheels $(TORCH) || \
		$(PIP) download --quiet --no-deps --dest .venv/wheels --index-url $(TORCH_INDEX) $(TORCH)
	@$(COMPILE) requirements/cpu.in $(CPU_BUILD) --output-file requirements/cpu.txt
	@# What the images install: the CPU one's versions are those that were tested here.
	@$(COMPILE) requirements/serve-cpu.in $(CPU_BUILD) --constraint requirements/cpu.txt \
		--output-file requirements/serve-cpu.txt
	@$(COMPILE) requirements/serve-cuda.in --output-file requirements/serve-cuda.txt

# Distils the default target's residual and exit drafts. Goes on where it stopped.
DATA ?= ../shared/data
drafts: setup
	@$(BIN)/demur synthesize --prompts $(DATA)/gsm8k/train.jsonl --limit 900 --general \
		--max-new-tokens 200 --per-part 64 --out $(HOME)/.cache/demur/corpus
	@$(BIN)/demur distill benchmarks/drafts/residual.yaml
	@$(BIN)/demur distill benchmarks/drafts/exit.yaml
	@for kind in residual exit; do $(BIN)/python -m drafts.shipped --draws 1 \
		$(HOME)/.cache/demur/runs/$$kind/ensemble drafts/trained/$$kind || exit 1; done
	@$(BIN)/demur synthesize --general --max-new-tokens 160 --out $(HOME)/.cache/demur/reference
	@cp $(HOME)/.cache/demur/reference/*.jsonl drafts/trained/reference
	@# Weights that another machine unpacks may differ in a last bit.
	@grep -v target_sha256 $(HOME)/.cache/demur/reference/corpus.json \
		> drafts/trained/reference/corpus.json

openapi: setup
	@$(BIN)/python -m server.openapi > docs/openapi.json

clean:
	rm -rf .venv build *.egg-info clients/*.egg-info
