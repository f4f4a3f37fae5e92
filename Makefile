# `make run` is all that a fresh machine needs; `make` alone lists what there is.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh

VENV := .venv
# The Python that the virtual environment is made with: make PYTHON=python3.12 run. Empty: the first that is new enough.
PYTHON ?=
IN_VENV := $(VENV)/bin/python

# Stamps inside the environment say what is installed, so that a second call installs nothing. An environment that does
# not work any more (moved, or its Python is gone) is made anew.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
JS := tests/js/node_modules/.installed
ifneq ($(shell $(IN_VENV) -c 'print("works")' 2>/dev/null),works)
.PHONY: $(RUN) $(DEV)
endif

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(RUN) ## Set up .venv with what running needs
	@echo "$(VENV) is ready"

.PHONY: run
run: $(RUN) ## Serve on 127.0.0.1:8000 (without RELAY_UPSTREAM_URL: a demo upstream)
	@$(IN_VENV) tools/hello
	@exec $(IN_VENV) -m gunicorn wsgi:app

.PHONY: up
up: $(RUN) ## Serve behind the shipped nginx, on 127.0.0.1:8080
	@tools/system-packages nginx
	@exec $(IN_VENV) tools/up

# Each file in one process of several; tests/conftest.py says how many (one if ARGS names some tests, as with ARGS="-n 0"),
# and which files come first. A process that dies ends it all, as it would alone.
SIDE_BY_SIDE := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: test
test: $(DEV) $(JS) ## Run every test, with real gunicorn, nginx, Redis and Chromium (ARGS="-k name" for some)
	@tools/system-packages nginx haproxy redis-server openssl curl chromium ip
	@tools/system-packages slowhttptest || echo "Without it its tests are skipped."
	$(IN_VENV) -m pytest $(SIDE_BY_SIDE) $(ARGS)

.PHONY: check
check: $(DEV) ## Lint, check formatting, types and the shipped configuration
	@tools/system-packages nginx openssl
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy
	PATH="$$PATH:/usr/sbin" tools/nginx-test
	@tools/deploy-check $(VENV)/bin

.PHONY: audit
audit: ## Look for known vulnerabilities in requirements.txt (asks PyPI)
	@tools/venv $(VENV)/audit requirements-audit.txt $(PYTHON)
	$(VENV)/audit/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r requirements.txt

.PHONY: bench
bench: $(DEV) ## Measure, beside other ways to do it
	$(IN_VENV) -m bench $(ARGS)

.PHONY: bench-compare
bench-compare: $(DEV) ## Measure beside another version: BASE=REV; fails if something got worse by more than 5 %
	@test -n "$(BASE)" || { echo "make bench-compare BASE=REV: with which revision?" >&2; exit 2; }
	$(IN_VENV) -m bench.compare $(BASE) $(ARGS)

.PHONY: soak
soak: $(DEV) ## Clients and upstreams that misbehave at random, for a while
	$(IN_VENV) -m tests.soak $(ARGS)

.PHONY: hosts
hosts: $(DEV) ## Kill, deploy and power off hosts in a lab on this machine, and count what clients see (needs root)
	@tools/system-packages nginx redis-server ip
	HOSTS_SCALE=$${HOSTS_SCALE:-4} $(IN_VENV) -m pytest tests/hosts $(ARGS)

.PHONY: hosts-soak
hosts-soak: $(DEV) ## The same under a steady load, a relay a minute for ten minutes (HOSTS_MINUTES for more)
	@tools/system-packages nginx redis-server ip
	HOSTS_SCALE=$${HOSTS_SCALE:-2} HOSTS_MINUTES=$${HOSTS_MINUTES:-10} $(IN_VENV) -m pytest -s tests/hosts/test_soak.py $(ARGS)

.PHONY: clean
clean: ## Remove .venv, caches and what nginx has written
	rm -rf $(VENV) tests/js/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	find nginx/run -mindepth 1 -not -name .gitignore -delete

$(RUN): requirements.txt
	@tools/venv $(VENV) requirements.txt $(PYTHON)
	@touch $@

# The development requirements include the others.
$(DEV): requirements-dev.txt requirements.txt
	@tools/venv $(VENV) requirements-dev.txt $(PYTHON)
	@touch $(RUN) $@

# What the tests of the JavaScript client need; nothing that is shipped does.
$(JS): tests/js/package.json tests/js/package-lock.json
	@tools/system-packages node npm
	@echo "Installing tests/js/package-lock.json into tests/js/node_modules ..."
	@npm ci --prefix tests/js --loglevel=error
	@touch $@
