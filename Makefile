# Everything runs in .venv, which the first target that needs it builds. `make help` lists the targets.

PYTHON ?= python3
# torch is installed first and by itself: the release that was tested, and the CPU build where pip is told of an index
# or a wheel folder that holds it. Another build: make install TORCH="torch==2.13.0 --index-url <index>".
TORCH ?= torch==2.13.0
# The networks of FID and what the tests compare metrics with. Without their torchvision, of which there is no build for
# every build of torch: where one of another build lies around, transformers fails to import.
METRICS := clean-fid==0.1.35 torch-fidelity==0.4.0
# What checks the citation file. It asks for jsonschema<4 and dicebear-core for 4; with 4.26 both were seen to work.
CITATION := cffconvert==2.0.0
# The oldest supported releases, for `make test-oldest`.
OLDEST ?= diffusers==0.36.0 "huggingface_hub<1" "transformers<5"
# What `make test-oldest` leaves to `make test`, since those releases make no difference to it: formulas, files and folders
# of our own, signals, drawings, torch's compiler, documents. What loads, routes and samples models of diffusers stays, and
# of training, export and pushes what goes through its pipelines.
SAME := claims data/damaged_records data/latent_shards data/latent_sources data/reading data/untrusted_latents
SAME += examples/demo_avatars examples/make_avatars examples/stopping metrics/feature_statistics metrics/feature_store
SAME += metrics/frechet metrics/not_finite metrics/npz metrics/precision_recall models/transformer_compile routing/ops
SAME += routing/route routing/subset runs/branches runs/folder runs/overwrite runs/signals
SAME += data/buckets data/captions data/latents_with_captions examples/evaluate_prompts examples/precompute_captions
SAME += examples/train_alignment examples/train_muon runs/optimizers runs/shift
SAME += repository examples/minimal_loop
SAME += additions cli docs flops full_disk packaging examples/import_latents examples/import_refusals examples/train_latents
SAME += models/mamba_facts models/rwkv_facts models/mamba_tread_2d models/rwkv_tread_2d models/transformer_modern
SAME += models/transformer_prefix objectives/terms/reconstruction objectives/terms/alignment routing/router routing/rows
SAME += reference
PYTEST_ARGS ?=

BENCH := .venv/bin/python benchmarks
RESULTS := benchmarks/results
SOURCES := src tests examples benchmarks docs hatch_build.py
# Two makes at once take turns in building an environment, where the system has flock.
LOCK := $(shell command -v flock)
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# PyTorch, MKL and oneDNN as on a processor without AVX; what inductor compiled for another one must not be taken here.
PLAIN := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
PLAIN += TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/.venv/inductor-plain"

.DEFAULT_GOAL := help
.PHONY: help install demo demo-avatars demo-text bench bench-gpu test test-long test-plain test-oldest style quality types docs
.PHONY: dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## build .venv with the package (editable) and all that the other targets need

demo: .venv/.installed ## train, sample and save a small TREAD model on real images, in a few minutes
	.venv/bin/python examples/demo.py

demo-avatars: .venv/.installed ## likewise on avatars of twenty classes; takes longer
	.venv/bin/python examples/demo_avatars.py

demo-text: .venv/.installed ## train a text-to-image model on captioned digits, ask it for pairs that it never saw
	.venv/bin/python examples/demo_text.py

bench: .venv/.installed ## measure everything on the CPU in under ten minutes; wants a quiet machine
	$(BENCH)/train_step.py --repeats 4 --output $(RESULTS)/train_step_cpu.json
	$(BENCH)/train_step.py --presets S/2 --tokens 1024,4096 --batch_size 2,1 --repeats 2 --no-peer \
		--output $(RESULTS)/train_step_long_cpu.json
	$(BENCH)/train_step.py --presets S/2 --modes blocks --repeats 3 --output $(RESULTS)/train_step_blocks_cpu.json
	$(BENCH)/train_step.py --presets S/2 --matmul_precision medium --repeats 4 --output $(RESULTS)/train_step_medium_cpu.json
	$(BENCH)/train_step.py --presets S/2 --dtype bfloat16 --repeats 4 --output $(RESULTS)/train_step_bf16_cpu.json
	$(BENCH)/profile_step.py --preset S/2 --output $(RESULTS)/profile_step_cpu.json
	$(BENCH)/memory.py --output $(RESULTS)/memory_cpu.json
	$(BENCH)/training_loop.py --repeats 4 --output $(RESULTS)/training_loop_cpu.json
	$(BENCH)/sampling.py --output $(RESULTS)/sampling_cpu.json
	$(BENCH)/routing_overhead.py --output $(RESULTS)/routing_overhead_cpu.json
	$(BENCH)/scan_cost.py --threads 1 --output $(RESULTS)/scan_cost_cpu.json
	$(BENCH)/hooks_overhead.py --repeats 3 --warmup 1 --batch_size 1 --output $(RESULTS)/hooks_overhead_cpu.json
	$(BENCH)/startup.py --output $(RESULTS)/startup_cpu.json
	$(BENCH)/report.py

bench-gpu: .venv/.installed ## test and measure on a GPU, made for an H200; wants a .venv with torch for it
	PYTHON=.venv/bin/python bash benchmarks/on_gpu.sh checks speed rest
	$(BENCH)/report.py

test: .venv/.installed ## run the tests; more flags in PYTEST_ARGS
	$(TEST_ENVIRONMENT) .venv/bin/python -m pytest -n 2 -m "not long" $(PYTEST_ARGS)

test-long: .venv/.installed ## run the tests that make test leaves out: two processes that are stopped and go on, compilers, smoke runs
	$(TEST_ENVIRONMENT) .venv/bin/python -m pytest -n 2 -m long $(PYTEST_ARGS)

test-plain: .venv/.installed ## run the tests without the processor's newer instructions
	$(TEST_ENVIRONMENT) $(PLAIN) .venv/bin/python -m pytest -n 2 -m "not long" $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed ## likewise with the oldest supported diffusers, without slow tests and benchmarks
	$(TEST_ENVIRONMENT) .venv-oldest/bin/python -m pytest -n 2 -m "not slow and not long" --ignore tests/benchmarks \
		$(foreach name,$(SAME),--ignore $(dir tests/$(name))test_$(notdir $(name)).py) $(PYTEST_ARGS)

style: .venv/.installed ## format the code and repair what ruff can repair
	.venv/bin/ruff check --fix $(wildcard $(SOURCES))
	.venv/bin/ruff format $(wildcard $(SOURCES))

quality: .venv/.installed ## check style, lint, types and the citation file; changes no source
	.venv/bin/ruff check $(wildcard $(SOURCES))
	.venv/bin/ruff format --check $(wildcard $(SOURCES))
	.venv/bin/cffconvert --validate
	$(MAKE) types

types: .venv/.installed ## check types: of the package with pyright, of README's and guides' snippets with pyright and mypy
	.venv/bin/python docs/snippets.py
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/mypy

docs: .venv/.installed ## build the documentation's site in build/docs; warnings are errors
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs build/docs

dist: ## build wheel and sdist, check both, try the wheel in a new environment; downloads packages
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install $(TORCH)
	.venv-dist/bin/python -c 'import torch; print(torch.__version__)' >.venv-dist/torch
	.venv-dist/bin/python -m pip install build twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python -m pip install "$$(ls dist/*.whl)[train,fid,text,lora,app,avatars]"
	.venv-dist/bin/python -m pip install --no-deps $(METRICS)
	.venv-dist/bin/python -c 'import torch; print(torch.__version__)' | diff .venv-dist/torch -
	bash tests/wheel_journey.sh .venv-dist/bin/python

clean: ## remove the environments, caches and builds
	rm -rf .venv .venv-oldest .venv-dist .pytest_cache .ruff_cache .mypy_cache build dist docs/api
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an environment whose build broke off is built on, not taken for done.
.venv/.installed: pyproject.toml src/diffusers_tread/version.py
	$(call build_environment,.venv,,dev)

.venv-oldest/.installed: pyproject.toml src/diffusers_tread/version.py
	$(call build_environment,.venv-oldest,$(OLDEST),test)

# $(1) folder, $(2) further requirements, $(3) extra of the package
define build_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Expected Python 3.10 or newer, got " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12 ...")'
	@mkdir -p $(1)
	$(LOCK:%=% $(1)) $(PYTHON) -m venv $(1)
	$(LOCK:%=% $(1)) $(1)/bin/python -m pip install $(TORCH)
	$(LOCK:%=% $(1)) $(1)/bin/python -m pip install $(2) -e ".[$(3)]"
	$(LOCK:%=% $(1)) $(1)/bin/python -m pip install --no-deps $(METRICS) $(CITATION)
	@touch $@
endef
