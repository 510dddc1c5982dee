# One command each: `make demo`, `make test`, `make lint`. Each sets up its virtual environment first.
# Variables: PYTHON (3.10-3.13), TORCH (e.g. TORCH=torch==2.13.0 or a CPU build), VENV, PYTEST_ARGS,
# JOBS (processes of `make test`, to which files of tests are dealt: one more than cores, since tests wait
# for processes; 0 for none but pytest's own).
PYTHON ?= python3
TORCH ?= torch>=2.6
VENV ?= .venv
JOBS ?= 3
VLLM_VENV ?= .vllm
TRAINER_VENVS ?= .trainers
TRAINERS ?= axolotl llamafactory megatron swift torchao torchtitan trl
LEFT_OUT ?= or exhaustive
LOOSE := --allow-untyped-calls --no-warn-return-any --no-warn-unused-ignores --ignore-missing-imports
BESIDE := end_to_end or gpu or exhaustive or alone
BIN := $(VENV)/bin
MIKE_ARGS ?= --push
export HF_HUB_OFFLINE ?= 1

.PHONY: help docs publish-docs install demo test test-all test-generated test-most test-alone test-gpu test-vllm vllm-venv test-trainers test-fast test-in-process lint format clean

help:
	@echo "make demo       the main job end to end, with what the package carries (a few minutes)"
	@echo "make test       all tests that need no GPU, with or without one, but for exhaustive ones"
	@echo "make test-all   those too: every architecture, every moment of a kill (before a release)"
	@echo "make test-gpu   those that need one"
	@echo "make test-vllm  those of --engine vllm, with its CPU build in $(VLLM_VENV) (4 GB)"
	@echo "make test-trainers  those of adapters in the real $(TRAINERS), each in $(TRAINER_VENVS)/NAME (2 to 6 GB)"
	@echo "make test-fast  unit tests only, but for generated code: two minutes"
	@echo "make test-in-process  those and what trains or builds in one process: no Ray"
	@echo "make lint       ruff and strict types"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make format     let ruff rewrite the code"

# torch first and by itself: otherwise another package's requirement picks its build. Builds for CUDA
# bring the Triton that fits them.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[cuda-tests]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/kdcache demo --out .demo

# What inspects generated code wants a process in which nothing else has run: it has one beside the
# others, and is printed after them. A step without tests (5) is none that failed: PYTEST_ARGS may
# choose. A process that crashes is not replaced: xdist 3.8 would wait forever for the rest of its file.
test: install
	@$(MAKE) --no-print-directory -j 2 test-generated test-most

# Some of the exhaustive tests end every Ray of the machine, so they come last.
test-all:
	@$(MAKE) --no-print-directory test LEFT_OUT=
	@$(MAKE) --no-print-directory test-alone LEFT_OUT=

test-generated: install
	@mkdir -p build
	@$(BIN)/python -m pytest -m "not (gpu $(LEFT_OUT))" tests/cuda $(PYTEST_ARGS) > build/generated.log 2>&1; \
		status=$$?; cat build/generated.log; [ $$status -eq 0 ] || [ $$status -eq 5 ]

test-most: install
	$(BIN)/python -m pytest -m "not (gpu or alone $(LEFT_OUT))" --ignore tests/cuda -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-alone: install
	$(BIN)/python -m pytest -m "alone and not (gpu $(LEFT_OUT))" tests/test_cluster.py $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-gpu: install
	KDCACHE_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

vllm-venv:
	bash tools/vllm_venv.sh $(VLLM_VENV) $(PYTHON)

# vLLM's own warnings are not ours to correct.
test-vllm: vllm-venv
	$(VLLM_VENV)/bin/python -m pytest -m "not (gpu $(LEFT_OUT))" -W default --disable-warnings tests/real_vllm $(PYTEST_ARGS)

# Likewise. A trainer that cannot be installed here (exit code 75) is named and passed over.
test-trainers:
	@for name in $(TRAINERS); do \
		status=0; bash tools/trainer_venv.sh $$name $(TRAINER_VENVS)/$$name $(PYTHON) || status=$$?; \
		if [ $$status -eq 75 ]; then echo "$$name: its tests did NOT run" >&2; continue; fi; \
		[ $$status -eq 0 ] && $(TRAINER_VENVS)/$$name/bin/python -m pytest -W default --disable-warnings \
			tests/real_trainers/test_$$name.py $(PYTEST_ARGS) || exit 1; \
	done

test-fast: install
	$(BIN)/python -m pytest -m "not (slow or $(BESIDE))" --ignore tests/cuda -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-in-process: install
	$(BIN)/python -m pytest -m "not ($(BESIDE))" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy $(LOOSE) benchmarks

docs: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build

# A tag vX.Y.Z becomes the pages of X.Y and `latest`, anything else those of `dev`; on the branch gh-pages.
publish-docs: docs
	PATH="$(abspath $(BIN)):$$PATH"; tag=$$(git tag --points-at HEAD 'v*' | head -1); tag=$${tag#v}; \
		if [ -n "$$tag" ]; then mike deploy $(MIKE_ARGS) --update-aliases "$${tag%.*}" latest \
			&& mike set-default $(MIKE_ARGS) latest; else mike deploy $(MIKE_ARGS) dev; fi

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
