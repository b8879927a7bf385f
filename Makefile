# Works with GNU make 3.81 and BSD tools, which is what macOS brings.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-clients demo chaos fuzz soak bench check audit deploy-tools deploy-check smoke docs \
	docs-reference format protos stubs-current lock redis h2load clean no-environment

# The lock has wheels for these versions; a newer Python would compile grpcio for half an hour. Each is asked to run,
# since version managers put names on PATH that do not.
PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && \
	echo $$python && break; done)

# protoc finds its plugin by PATH, and the tests their redis-server, which a bare PATH of macOS or cron does not show.
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/bin:/usr/local/bin:/opt/homebrew/bin

# $(call install,DEBIAN PACKAGE,WHAT TO TYPE): root on Debian, as in CI and containers, gets the package; others are
# told the line, since sudo is theirs to decide. A Redis service that its package may start does not matter: each test
# run starts servers of its own, on free ports.
install = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing $(1)…"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends $(1) >/dev/null; \
	else echo "Missing: please run '$(2)', then the same make target again." >&2; exit 1; fi

comma := ,
GO := $(shell command -v go)
NODE := $(shell command -v npm)
APT := $(shell command -v apt-get)
# What the tests of the clients start the service with.
CLIENT_ENV = DEDUP_TEST_PYTHON="$(CURDIR)/.venv/bin/python"

# $(call generate,FOLDER)
generate = .venv/bin/python -m grpc_tools.protoc -I protos --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) protos/dedup/v1/dedup.proto

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'Options: ARGS="..." is handed on by run, test, test-clients, demo, chaos, fuzz, soak, bench, deploy-check and lock; PYTHON=... chooses the Python of a new .venv.'

run: .venv/run.stamp ## Start the service (ARGS="--store-url redis://127.0.0.1:6379")
	@exec .venv/bin/dedup-service serve --banner $(ARGS)

test: .venv/dev.stamp redis ## Run every test (ARGS="-k claim" chooses)
	.venv/bin/pytest -n auto --dist worksteal $(ARGS)

# Where Go or Node is missing its client is not tested, and the last line says so.
test-clients: .venv/dev.stamp redis ## Test the Python, Go and Node clients against the live service
	.venv/bin/pytest -c clients/python/pyproject.toml clients/python/tests -n auto --dist worksteal $(ARGS)
	$(if $(GO),cd clients/go && PROTOC="$(CURDIR)/.venv/bin/python -m grpc_tools.protoc" ./generate.sh --check)
	$(if $(GO),cd clients/go && $(CLIENT_ENV) go vet ./... && $(CLIENT_ENV) go test -race ./...)
	$(if $(GO),cd examples/lucky_box/go && go vet ./...)
	$(if $(GO),cd benchmarks/loadgen && go vet ./...)
	$(if $(NODE),cd clients/node && npm ci --no-audit --no-fund && $(CLIENT_ENV) npm test)
	@echo "Tested: Python$(if $(GO),$(comma) Go)$(if $(NODE),$(comma) Node).\
	$(if $(GO),, No Go here: its client was NOT tested.)$(if $(NODE),, No Node here: its client was NOT tested.)"

demo: .venv/dev.stamp redis ## Three clicks within a millisecond, without and with the service (ARGS="--rounds 50")
	@.venv/bin/python examples/lucky_box/demo.py $(ARGS)

chaos: .venv/dev.stamp redis ## Check histories under faults for 3 minutes (ARGS="--seed 1")
	@PYTHONPATH=tests .venv/bin/python -m chaos.run $(ARGS)

fuzz: .venv/dev.stamp ## Fuzz each reader of bytes for a minute, on Linux (ARGS="--seconds 10 --seed 1")
	@PYTHONPATH=tests .venv/bin/python -m fuzz.run $(ARGS)

soak: .venv/dev.stamp redis ## Ten minutes of mixed load, on Linux: memory stays flat (ARGS="--engine native")
	@PYTHONPATH=tests .venv/bin/python -m soak.run $(ARGS)

# Where Go is missing claims of fresh ids and batches are not measured, and the report says so.
bench: .venv/dev.stamp redis h2load ## Measure for ten minutes, on Linux (ARGS="--quick" sees in one that all of it runs)
	@.venv/bin/python -m benchmarks.run $(ARGS)

check: .venv/dev.stamp stubs-current ## Lint, format, types, layers, contract, generated stubs, lock
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	MYPYPATH=clients/python:tests .venv/bin/mypy clients/python/dedup clients/python/tests
	.venv/bin/lint-imports
	cd protos && ../.venv/bin/buf lint
	cd protos && ../.venv/bin/buf format -d --exit-code
	cd protos && ../.venv/bin/buf breaking --against baseline.json
	.venv/bin/python -m pip check

audit: .venv/pyvenv.cfg ## Ask for known vulnerabilities of the locked packages
	@.venv/bin/python scripts/audit.py

# Go builds from source, a minute or two once and seconds after that. Debian's package has promtool in it, and is taken
# apart rather than installed, which would start a Prometheus.
deploy-tools: ## Get kustomize, helm and promtool into build/bin, where Go and apt-get are there
	@mkdir -p build/bin
	$(if $(GO),GOBIN="$(CURDIR)/build/bin" go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.0)
	$(if $(GO),GOBIN="$(CURDIR)/build/bin" go install helm.sh/helm/v3/cmd/helm@v3.22.0)
	$(if $(APT),[ -x build/bin/promtool ] || (apt-get -qq update; cd build && apt-get -qq -o APT::Sandbox::User=root download prometheus && \
		dpkg-deb -x prometheus_*.deb prometheus && cp prometheus/usr/bin/promtool bin/))

deploy-check: .venv/dev.stamp ## Check the Dockerfile, manifests, charts and alerts (ARGS="--require helm")
	@PATH="$(CURDIR)/build/bin:$(PATH)" .venv/bin/python scripts/deploy_check.py $(ARGS)

smoke: .venv/pyvenv.cfg ## Install a clean copy with plain pip, and claim twice
	.venv/bin/python scripts/smoke.py

docs: .venv/docs.stamp ## Build the documentation into build/site, and check its links
	.venv/bin/python scripts/reference.py --check
	.venv/bin/python scripts/build_docs.py

docs-reference: .venv/dev.stamp ## Write the generated parts of the documentation anew
	.venv/bin/python scripts/reference.py

format: .venv/dev.stamp ## Format the code and the contract
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format
	cd protos && ../.venv/bin/buf format -w

protos: .venv/dev.stamp ## Write the generated Python stubs anew
	$(call generate,clients/python)

stubs-current: .venv/dev.stamp
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && $(call generate,"$$stubs") && \
	diff -r -u -x __pycache__ -x __init__.py clients/python/dedup/v1 "$$stubs/dedup/v1" || \
	{ echo "generated stubs are stale: run make protos" >&2; exit 1; }

# What is locked stays, unless ARGS="--upgrade" or ARGS="--upgrade-package NAME" says otherwise. Resolved for the oldest
# Python, whichever runs it; run.txt and docs.txt follow dev.txt, since all are installed into one environment.
LOCK = "$$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--annotation-style line --custom-compile-command "make lock" pyproject.toml

lock: .venv/pyvenv.cfg ## Write requirements/*.txt anew (ARGS="--upgrade" for the newest)
	@tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && .venv/bin/python -m venv "$$tools" && \
	"$$tools/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 && \
	$(LOCK) --group dev -c requirements/constraints.txt -o requirements/dev.txt $(ARGS) && \
	$(LOCK) --group build -c requirements/dev.txt -o requirements/run.txt && \
	$(LOCK) --group docs -c requirements/dev.txt -o requirements/docs.txt

clean: ## Remove the environment, caches and builds
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# One environment serves all: what dev.txt and docs.txt install includes run.txt, hence the second stamp.
.venv/%.stamp: requirements/%.txt pyproject.toml .venv/pyvenv.cfg
	@echo "Setting up the environment in .venv (about a minute)…" >&2
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch .venv/run.stamp $@

# An environment whose Python has gone, as after an upgrade of the system, is made anew. Debian splits what venv needs
# out of python3, and venv without it leaves a broken folder behind.
.venv/pyvenv.cfg: $(shell .venv/bin/python -c 'import pip' 2>/dev/null || echo no-environment)
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 to 3.14 is needed: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])') && \
		$(call install,$$package,sudo apt-get install $$package); }
	@$(PYTHON) -m venv --clear .venv

redis:
	@command -v redis-server >/dev/null || { $(call install,redis-server,$(if \
		$(filter Darwin,$(shell uname)),brew install redis,sudo apt-get install redis-server)); }

h2load:
	@command -v h2load >/dev/null || { $(call install,nghttp2-client,sudo apt-get install nghttp2-client); }
