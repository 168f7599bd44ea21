# Everything here works in a fresh clone: a target makes .venv first, from requirements.lock, when it is missing or older.
# Needs Python 3.11 or newer with pip; another one than python3: make PYTHON=python3.12 test

PYTHON ?= python3
UV_VERSION := 0.13.8
TORCH := torch==2.15.0
TORCHVISION := torchvision==0.29.2
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: help study test results validate bench notebooks students site lab lint lock
help:
	@echo "make study      the label-fraction study on the phantom: tables and figures in out/"
	@echo "make test       all tests, and every notebook executed again"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make validate   a small grid, then all its run notebooks executed again from scratch: as many subjects, scores and steps"
	@echo "make bench      speed and memory against other projects, on a quiet machine: paper_figures/benchmarks"
	@echo "make site       notebooks, pages and reference as HTML that needs no server: build/site/docs/index.html"
	@echo "make students   lessons and exercises without solutions: build/students.zip"
	@echo "make notebooks  rebuild and execute all notebooks from notebooks/scripts"
	@echo "make lint       ruff over code and notebooks"
	@echo "make lock       resolve requirements.lock anew from pyproject.toml"

study: $(STAMP)
	$(VENV)/bin/clseg run params/studies/quickstart.yaml --profile laptop

# One call, so that its last line counts everything. One worker per file: a notebook's cells stay together, in order. Files come in
# alphabetical order: those with few and long tests are not the last.
test: $(STAMP)
	$(VENV)/bin/python -m pytest --nbval-lax -n 2 --dist loadscope --no-loadscope-reorder tests notebooks

results: $(STAMP)
	$(VENV)/bin/clseg results
	$(VENV)/bin/python notebooks/build.py

lab: $(STAMP)
	$(VENV)/bin/jupyter-lab notebooks/00_start_here.ipynb

validate: $(STAMP)
	rm -rf build/validate
	$(VENV)/bin/clseg run params/studies/quickstart.yaml --profile smoke --out build/validate
	$(VENV)/bin/python -m pytest --nbval-lax $$(find build/validate -name notebook.ipynb)

bench: $(STAMP)
	CLSEG_OUT=. $(VENV)/bin/python tests/benchmarks

notebooks: $(STAMP)
	$(VENV)/bin/python notebooks/build.py

# All that their links lead to, but neither solutions nor TEACHING.md, which has the answers of the quiz.
STUDENTS := notebooks/*.ipynb README.md GLOSSARY.md CONTRIBUTING.md PROTOCOL.md docs/*.md paper_figures/laptop/acdc/acdc/*.png
students:
	mkdir -p build
	$(PYTHON) -c "import glob, zipfile; z = zipfile.ZipFile('build/students.zip', 'w', zipfile.ZIP_DEFLATED); \
	  [z.write(file) for place in '$(STUDENTS)'.split() for file in sorted(glob.glob(place))]"

# Pages as they are committed: nothing is executed.
site: $(STAMP)
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c docs . build/site

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lock: $(STAMP)
	$(VENV)/bin/uv pip compile pyproject.toml --extra test --extra cluster --extra site --extra browser --upgrade \
	  --upgrade-package $(TORCH) --upgrade-package $(TORCHVISION) --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock

# The stamp is written last: an environment that an interruption left half made has none, and is made anew.
$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clseg needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(VENV)/bin/uv pip install --python $(VENV) --compile-bytecode --require-hashes --only-binary :all: --requirement requirements.lock
	$(VENV)/bin/uv pip install --python $(VENV) --offline --no-deps --no-build-isolation --editable .
	@touch $@
