# Make names claims, Hydra names values: no hyperparameter stands here.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Further overrides for any experiment: make reproduce-diversity ARGS="model.groups_per_category=2"
ARGS ?=
# The model of any experiment, in place of its own: make reproduce-paper MODEL=sdxl
MODEL :=

.DEFAULT_GOAL := help
.PHONY: help install sweep cfg-scale peers few-steps-peers safety publish latency redteam gate report demo doctor notebooks mini-models test test-slow test-gpu test-browser test-versions docs dist types lint

# The groups of the list, each with its targets in order; what is in none is for development.
USE := demo report doctor
REPRODUCE := reproduce-% reproduce-paper sweep cfg-scale peers few-steps-peers safety redteam gate latency reproduce-deliberation publish
help:  ## this list
	@awk -F ':.*## ' -v use="$(USE)" -v reproduce="$(REPRODUCE)" ' \
	  /^[a-z%-]+:.*## / {text[$$1] = $$2; order[++n] = $$1} \
	  function show(title, names,   i, count, list) { \
	    print title; count = split(names, list, " "); \
	    for (i = 1; i <= count; i++) {printf "  make %-22s %s\n", list[i], text[list[i]]; delete text[list[i]]} } \
	  END {show("Use", use); show("Reproduce", reproduce); names = ""; \
	    for (i = 1; i <= n; i++) if (order[i] in text) names = names " " order[i]; show("Develop", names)}' $(MAKEFILE_LIST)

# One stamp an extra; a changed pyproject.toml installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --editable ".[$*]"
	@touch $@

install: $(VENV)/.installed-dev  ## install the benchmark, its tests and its pages into .venv

# reproduce-NAME: images, scores, table and figures of conf/experiment/NAME.yaml, and its values beside the published ones.
reproduce-%: $(VENV)/.installed-experiments FORCE  ## an experiment, as reproduce-diversity, reproduce-copyright, reproduce-sweep
	$(PY) -m experiments reproduce experiment=$* $(MODEL:%=model=%) $(ARGS)
reproduce-paper: FORCE  ## MODEL=sdxl or flux-dev, on a GPU: the paper's table with ours in it (docs/gpu.md)
FORCE:

sweep: reproduce-sweep reproduce-sweep_flux  ## alpha x threshold x timestep range on the development prompts: table, heat maps, Pareto front

cfg-scale: reproduce-cfg_scale reproduce-cfg_scale_flux  ## baseline and NegToMe at every guidance scale (50 minutes)

# What all the following acts are of: the grid first, by which the settings of the table are chosen.
PEERS := peers_grid peers_grid_flux peers peers_flux
peers: $(VENV)/.installed-experiments  ## NegToMe and every other method: settings, tables, Pareto fronts, ranking (45 minutes)
	status=0; for name in $(PEERS); do \
	  $(PY) -m experiments reproduce experiment=$$name $(ARGS) || status=1; \
	  $(PY) -m experiments rank experiment=$$name $(ARGS) || exit 1; \
	done; exit $$status

few-steps-peers: $(VENV)/.installed-experiments  ## the same at 4 denoising steps on mini-sdxl
	$(MAKE) peers PEERS="few_steps_peers_grid few_steps_peers"

safety: $(VENV)/.installed-experiments  ## requests through a policy: guards, steering, output check, scorecard (40 minutes)
	$(PY) -m experiments floors experiment=safety_floors $(ARGS)
	status=0; $(PY) -m experiments reproduce experiment=safety $(ARGS) || status=1; \
	  $(PY) -m experiments scorecard experiment=safety $(ARGS) || exit 1; exit $$status

publish: $(VENV)/.installed-experiments  ## EXPERIMENT=diversity: its table and figures into results/, in place of the published ones
	$(PY) -m experiments tabulate experiment=$(EXPERIMENT) results=results $(ARGS)
	$(PY) -m experiments plot experiment=$(EXPERIMENT) results=results $(ARGS)

latency: $(VENV)/.installed-experiments  ## time and memory of the method: tables and curves (6 minutes on a CPU)
	$(PY) -m experiments latency experiment=latency $(ARGS)

.PHONY: reproduce-latency
reproduce-latency: latency

# The default budget is chosen for two cores; redteam.queries=16 takes several times as long.
redteam: $(VENV)/.installed-experiments  ## search for prompts that obtain a protected concept (47 minutes on two shared cores)
	$(PY) -m experiments redteam $(ARGS)

gate: $(VENV)/.installed-experiments  ## judge the tables of safety and redteam by conf/safety/gate.yaml: pass, review, fail
	$(PY) -m experiments gate $(ARGS)

report: $(VENV)/.installed-experiments  ## make a page of all tables, figures and images: outputs/report/index.html
	$(PY) -m experiments report $(ARGS)

demo: $(VENV)/.installed-demo  ## try the method in the browser, on this machine only: http://127.0.0.1:7860
	$(PY) -m experiments demo $(ARGS)

doctor: $(VENV)/.installed-experiments  ## list which encoders and models have their weights here, and how to get the others
	@$(PY) -m experiments doctor

notebooks: $(VENV)/.installed-notebooks  ## run the notebooks and keep in them what they show (2 minutes)
	OMP_NUM_THREADS=1 $(PY) -m experiments notebooks

mini-models: $(VENV)/.installed-training  ## retrain the embedded models from public emoji packages (GPU, 20 minutes)
	$(PY) -m training train --out outputs/mini --npm outputs/npm $(ARGS)
	$(PY) -m training export --work outputs/mini --models models
	$(PY) -m training reference --data outputs/mini/data
	$(PY) -m training protected --npm outputs/npm
	$(PY) -m training people --npm outputs/npm
	$(PY) -m training memorised

.PHONY: mini-distilled
mini-distilled: $(VENV)/.installed-training  ## distil the embedded models to four steps (one core, 10 minutes)
	$(PY) -m training distil --teacher models/mini-sdxl --out models/mini-sdxl-turbo --minutes 5 --bf16 $(ARGS)
	$(PY) -m training distil --teacher models/mini-flux --out models/mini-flux-schnell --minutes 4 --bf16 $(ARGS)

.PHONY: reproduce-deliberation mini-guard
reproduce-deliberation: $(VENV)/.installed-training  ## train small guards by examples and rewards, and compare them (5 minutes)
	$(PY) -m training deliberation $(ARGS)

mini-guard: $(VENV)/.installed-training  ## retrain the embedded guard on conf/safety/policy.yaml (3 minutes)
	$(PY) -m training guard $(ARGS)

test: $(VENV)/.installed-dev  ## the tests, offline, on a CPU (4 minutes on two Intel Xeon cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-dev  ## what `make test` leaves out: compilers, launchers, notebooks, sibling pipelines (12 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.installed-dev  ## what only CUDA shows: kernels in halves, memory, that nothing waits for the device
	$(PY) -m pytest -m gpu $(ARGS)

test-browser: $(VENV)/.installed-browser  ## the pages in a real Chromium (apt install chromium); skipped where there is none
	OMP_NUM_THREADS=1 $(PY) -m pytest -m browser tests/browser $(ARGS)

# The library's alone, in environments of their own: the lowest of each as pyproject.toml promises, and the newest there are.
LOWEST := torch==2.6.0 diffusers==0.36.0
NEWEST := torch diffusers torchao gguf
test-versions: $(VENV)/bin/python  ## the library's tests on the lowest torch and diffusers promised, and on the newest (a download)
	for versions in "$(LOWEST)" "$(NEWEST)"; do \
	  $(PYTHON) -m venv --clear outputs/versions && \
	  outputs/versions/bin/python -m pip install --quiet --editable . $$versions transformers accelerate peft pillow protobuf ftfy \
	    sentencepiece psutil pytest pytest-xdist hypothesis && \
	  OMP_NUM_THREADS=1 outputs/versions/bin/python -m pytest -n auto tests/negtome $(ARGS) && \
	  OMP_NUM_THREADS=1 outputs/versions/bin/python -m pytest -n auto -m slow tests/negtome/test_architectures.py $(ARGS) || exit 1; \
	done

docs: $(VENV)/.installed-docs  ## the site of docs/ and the docstrings, offline: outputs/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

dist: $(VENV)/.installed-dev  ## wheel and source archive, checked: outputs/dist
	rm -rf outputs/dist
	$(PY) -m build --outdir outputs/dist
	$(PY) -m twine check --strict outputs/dist/*

types: $(VENV)/.installed-dev  ## mypy: the types of all packages but the modules that pyproject.toml leaves out
	$(PY) -m mypy

lint: types  ## ruff: rules and format; types; imports between packages; prose of README and docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest --quiet tests/test_prose.py
