# Everything here works on a fresh machine: each target first makes .venv, once, from constraints.txt.

PROMPT ?= robot:
export PROMPT
BIN := .venv/bin
READY := .venv/.ready

.PHONY: generate test test-targets unit check dev wheel bench peers parity docs clean

generate: $(READY)  ## answer PROMPT with the built-in model
	@$(BIN)/max generate --prompt "$$PROMPT"

# Whatever the environment says of bytecode: the processes that tests start would each compile all sources anew.
test unit: export PYTHONDONTWRITEBYTECODE :=

test: $(READY)  ## every test
	@$(BIN)/pytest

test-targets: .venv-targets/.ready  ## compile for every GPU, TPU and CPU level; installs what that takes, gigabytes, apart
	@.venv-targets/bin/pytest tests/targets

unit: $(READY)  ## the quick tests only
	@$(BIN)/pytest tests/unit -m "not slow"

check: $(READY)  ## what the tests do not see: lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

dev: $(READY)  ## an environment to work in; afterwards `. .venv/bin/activate`

wheel: $(READY)  ## build the wheel and generate text with it in a clean environment
	@.ci/wheel

bench: $(READY) peers  ## time the commands from start to exit, and the engine beside llama.cpp and OpenVINO
	@$(BIN)/python -m max.bench.startup
	@$(BIN)/python -m max.bench.compare

peers: build/peers/llama/.ready build/peers/openvino/.ready  ## the environments of the engines to compare with

parity: .venv-parity/.ready  ## make the references of transformers on torch anew
	@.venv-parity/bin/python tests/parity/make_references.py

clean:  ## remove what was built, and the environments; artifacts in the user's cache stay
	@rm -rf .venv .venv-parity .venv-targets build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt .ci/environment .ci/python $(wildcard compiler/kernels/*)
	@.ci/environment
	@touch $@

build/peers/llama/.ready: bench/peers/requirements-llama.txt
	@python=$$(.ci/python 3.12) && "$$python" -m venv --clear build/peers/llama
	@CMAKE_ARGS="-DGGML_NATIVE=ON" build/peers/llama/bin/python -m pip install --quiet --no-binary llama-cpp-python --requirement $<
	@touch $@

build/peers/openvino/.ready: bench/peers/requirements-openvino.txt
	@python=$$(.ci/python 3.11) && "$$python" -m venv --clear build/peers/openvino
	@build/peers/openvino/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

.venv-targets/.ready: $(READY) constraints-targets.txt
	@python=$$(.ci/python) && "$$python" -m venv --clear .venv-targets
	@.venv-targets/bin/python -m pip install --quiet --requirement constraints.txt
	@.venv-targets/bin/python -m pip install --quiet --no-build-isolation --constraint constraints-targets.txt --editable '.[cuda,rocm,tpu]'
	@touch $@

# torch publishes no build for the Python of this project everywhere; 3.11 has one.
.venv-parity/.ready: tests/parity/requirements.txt
	@python=$$(.ci/python 3.11) && "$$python" -m venv --clear .venv-parity
	@.venv-parity/bin/python -m pip install --quiet --requirement $<
	@touch $@
