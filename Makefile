# Everything runs in virtual environments that the first call makes: .venv with SGLang, .venv-vllm with vLLM, which pin
# different versions of the same packages. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env env-vllm serve serve-vllm bench-example test test-vllm lint clean

# A model of tools/fetch_model.py, a checkpoint folder, or the name of a model on a hub.
MODEL ?= smollm2
KV_CACHE_DTYPE ?= kvarn_k4v2_g128
# More flags for tools/serve.py (--once, --port N), and any flag of the engine.
ARGS ?=

BIN := $(CURDIR)/.venv/bin
VLLM_BIN := $(CURDIR)/.venv-vllm/bin
# Last on the path, so that an environment which brings its own SGLang keeps its own start-up hooks.
TEST_ENV := PYTHONPATH="$${PYTHONPATH:+$$PYTHONPATH:}$(CURDIR)/tools/sglang_cpu" OMP_NUM_THREADS=1

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

env: ## make or update .venv
	@tools/setup_env.sh sglang

env-vllm: ## make or update .venv-vllm
	@tools/setup_env.sh vllm

serve: env ## serve a small model with SGLang and ask it something (MODEL=, KV_CACHE_DTYPE=, ARGS="--once")
	@"$(BIN)/python" tools/serve.py --model "$(MODEL)" --kv-cache-dtype "$(KV_CACHE_DTYPE)" $(ARGS)

serve-vllm: env-vllm ## the same with vLLM
	@"$(VLLM_BIN)/python" tools/serve.py --engine vllm --model "$(MODEL)" --kv-cache-dtype "$(KV_CACHE_DTYPE)" $(ARGS)

# Where the example's rows go; what stands in it is not measured again. The cache's memory is that of few tokens, so that
# a small burst is more than fp16 holds.
BENCH_OUT ?= build/bench-example.json
BENCH_BYTES ?= 67108864

bench-example: env-vllm ## compare a small model with and without KVarN under a small burst (BENCH_OUT=)
	@model="$$("$(VLLM_BIN)/python" tools/fetch_model.py --model "$(MODEL)" | tail -n 1)" && \
	"$(VLLM_BIN)/python" -m kvarn bench serve --engine vllm --model "$$model" --dtypes "$(KV_CACHE_DTYPE)" \
	  --workload burst --scale 0.05 --out "$(BENCH_OUT)" -- --kv-cache-memory-bytes $(BENCH_BYTES) --max-model-len 1024

test: lint test-vllm ## check the code and run all tests
	$(TEST_ENV) "$(BIN)/python" -m pytest -n 2 --dist loadgroup

test-vllm: env-vllm ## run the tests that need vLLM
	"$(VLLM_BIN)/python" -m pytest -n 2 --dist loadfile tests/vllm

lint: env ## check style, types and import contracts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

clean: ## remove .venv and everything else that was made here (models stay in their cache)
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find kvarn tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
