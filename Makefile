# make demo       a small trained model describes a picture
# make test       every test
# make deep       the property tests with thousands of cases
# make lint       ruff
# make bench      speed, as ratios to transformers and to the machine's own limits
# make sanitize   the C++ kernels under address and undefined-behaviour checks
#
# Each target does all its own set-up: a virtual environment in .venv, the packages, the kernels. On Linux, PyPI's
# torch brings gigabytes of CUDA libraries; without an NVIDIA GPU, spare yourself the download:
#
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST ?=

PY = $(VENV)/bin/python
INSTALL = $(PY) -m pip install --quiet --constraint constraints.txt $(TORCH_INDEX:%=--extra-index-url %)
export PATH := $(abspath $(VENV))/bin:$(PATH)
READY = $(VENV)/.ready
READY_TO_TEST = $(VENV)/.ready-to-test

.PHONY: demo test deep lint bench sanitize clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) -m minivlm.run

test: $(READY_TO_TEST)
	$(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST)

deep: $(READY_TO_TEST)
	HYPOTHESIS_PROFILE=deep $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST)

lint: $(READY_TO_TEST)
	$(PY) -m ruff check .

bench: $(READY_TO_TEST)
	for script in $(filter-out bench/rivals.py,$(wildcard bench/*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

sanitize: $(READY_TO_TEST)
	$(MAKE) --directory csrc sanitize PYTHON=$(abspath $(PY))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: made anew when what they were made from changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	@echo "installing torch and friends into $(VENV) (once, some minutes)"
	$(INSTALL) --editable .
	@echo "building the kernels (once, about a minute; without a C++ compiler the references stand in)"
	$(PY) -c 'from minivlm.ops.backend import why_not; print("kernels:", why_not("minivlm") or "ready")'
	@touch $@

$(READY_TO_TEST): $(READY)
	$(INSTALL) --editable '.[test,tutorials]'
	@touch $@
