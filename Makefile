# make run    fine-tune once: notebook 11, headless. DATA=my.csv COLUMNS=instruction=Frage,output=Antwort
#             BASE=folder-or-hub-name EPOCHS=3 SEED=1 CHANGE="learning_rate=7e-5, rank=8"
# make test   all notebooks, outputs compared, and the tests of utils. PYTEST_ARGS="notebooks/00_start_here.ipynb -x"
# make oldest the same with the oldest versions that requirements.txt allows, in .venv-oldest
# Both make .venv on first use and install requirements.txt there; PYTHON=python3.12 picks another Python.

PYTHON ?= python3
VENV ?= .venv
STAMP = $(VENV)/.installed
# By default everything, two files at a time on one core each; the chapters first, because the first one trains the
# adapter that others load.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# The settings reach the program through the environment: no shell ever splits or reads them.
export DATA COLUMNS BASE CHANGE EPOCHS SEED
export CALLED_FROM = $(PWD)

.PHONY: run test oldest
.DEFAULT_GOAL = run

run: $(STAMP)
	@"$(VENV)/bin/python" -m utils.notebook.headless

test: $(STAMP)
	@"$(VENV)/bin/python" -m pytest $(PYTEST_ARGS)

oldest:
	@sed -nE 's/^([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt > "$${TMPDIR:-/tmp}/oldest.txt"
	@PIP_CONSTRAINT="$${TMPDIR:-/tmp}/oldest.txt" $(MAKE) test VENV=.venv-oldest

# Re-made when requirements.txt changes. The stamp comes last: an interrupted installation is taken up again.
$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if (3, 11) <= v[:2] <= (3, 13) else "%s is Python %d.%d; the course needs 3.11 to 3.13. Try: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))' \
	  || { command -v $(PYTHON) >/dev/null || echo "No $(PYTHON) found. Install it (Debian, Ubuntu: sudo apt install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make environments. Debian, Ubuntu: sudo apt install python3-venv"; exit 1; }
	@"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv "$(VENV)"; }
	@echo "installing requirements.txt into $(VENV) (minutes the first time: torch is a large download)"
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@! command -v nvidia-smi >/dev/null || \
	  "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check $$(sed -n 's/; extra == "gpu".*//p' requirements.txt)
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check $$(sed -n 's/; extra == "gguf".*//p' requirements.txt) \
	  || echo "note: the packages for GGUF could not be installed, so chapter 07 is not tested"
	@touch "$(STAMP)"
