# make demo   set up, then clips -> store -> encoder -> report (DATA=<folder> uses your own clips)
# make check  set up, then lint, types and the pure tests: a minute, to run while working
# make test   set up, then lint, types and tests
# make test-slow     set up, then the tests that take long: deaths, waits, whole runs once more
# make test-cluster  set up, then nodes that come and go, and whole jobs on pods in a box; needs root
# make lock   pin what pyproject.toml asks for into constraints.txt

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= out/demo$(if $(DATA),-$(notdir $(patsubst %/,%,$(DATA))))

.PHONY: demo check test test-slow test-cluster lint types lock browser box clean

demo: $(STAMP)
	$(BIN)/diccae demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(ARGS)

# Rooms whose tests start neither Ray nor a server, and hardly a process. One that does waits for `test`.
PURE := tests/test_house.py tests/test_docs.py tests/clustering/kmeans tests/clustering/rounds \
  tests/pipeline/source tests/pipeline/ingest/test_plan.py tests/pipeline/store/test_store.py \
  tests/training/data tests/training/evaluation tests/training/loop tests/training/losses \
  tests/training/model tests/training/weights tests/deploy/test_manifests.py \
  tests/deploy/test_package.py tests/diccae/test_config.py \
  --ignore tests/training/loop/test_pretrainer.py

check: $(STAMP) lint types
	$(BIN)/python -m pytest -q -m "not slow and not soak and not gpu" -n 2 --dist loadfile $(PURE) $(ARGS)

SHARED_OUT := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) browser box lint types
	$(BIN)/python -m pytest -m "not slow and not soak and not gpu and not cluster" $(SHARED_OUT) $(ARGS)

test-slow: $(STAMP) browser box
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster" $(SHARED_OUT) $(ARGS)

# One after the other: a box of four Ray nodes has the machine to itself.
test-cluster: $(STAMP) box
	@command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
	  apt-get install -qq -y --no-install-recommends postgresql python3-psycopg2 >/dev/null 2>&1; true
	$(BIN)/python -m pytest -m cluster -s tests/training/on_ray tests/deploy $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The report is tested in a real browser; without one that test is skipped with a reason.
browser:
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq >/dev/null 2>&1; \
	  apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1 && exit 0; fi; \
	echo "no Chromium found: the browser test of the report will be skipped"

# Pods are tested in namespaces; without these tools, or not as root, those tests are skipped.
box:
	@for name in ip nsenter setpriv nft wget; do command -v $$name >/dev/null || missing=1; done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq >/dev/null 2>&1; \
	  apt-get install -qq -y --no-install-recommends iproute2 util-linux nftables wget \
	    >/dev/null 2>&1 && exit 0; fi; \
	echo "no iproute2, nftables, wget: the tests of pods in a box will be skipped"

lock: $(STAMP)
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --upgrade --python $(BIN)/python --all-extras --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links -o constraints.txt pyproject.toml

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "diccae needs Python 3.11: no $(PYTHON) on the PATH \
	(set PYTHON=/path/to/python3.11)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "diccae needs Python 3.11, found $$($(PYTHON) --version)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf out runs .pytest_cache .ruff_cache .mypy_cache
