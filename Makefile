# Everything here works on a fresh machine: each target first makes .venv, once, from constraints.txt.

PROMPT ?= robot:
export PROMPT
BIN := .venv/bin
READY := .venv/.ready

.PHONY: generate test unit check dev wheel bench parity docs clean

generate: $(READY)  ## answer PROMPT with the built-in model
	@$(BIN)/max generate --prompt "$$PROMPT"

test: $(READY)  ## every test
	@$(BIN)/pytest

unit: $(READY)  ## the quick tests only
	@$(BIN)/pytest tests/unit -m "not slow"

check: $(READY)  ## what the tests do not see: lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

dev: $(READY)  ## an environment to work in; afterwards `. .venv/bin/activate`

wheel: $(READY)  ## build the wheel and generate text with it in a clean environment
	@.ci/wheel

bench: $(READY)  ## time the commands from start to exit
	@$(BIN)/python -m max.bench.startup

parity: .venv-parity/.ready  ## make the references of transformers on torch anew
	@.venv-parity/bin/python tests/parity/make_references.py

clean:  ## remove what was built, and the environments; artifacts in the user's cache stay
	@rm -rf .venv .venv-parity build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt .ci/environment .ci/python $(wildcard compiler/kernels/*)
	@.ci/environment
	@touch $@

# torch publishes no build for the Python of this project everywhere; 3.11 has one.
.venv-parity/.ready: tests/parity/requirements.txt
	@python=$$(.ci/python 3.11) && "$$python" -m venv --clear .venv-parity
	@.venv-parity/bin/python -m pip install --quiet --requirement $<
	@touch $@
