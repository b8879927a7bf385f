# Works with GNU make 3.81 and BSD tools, as on macOS.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-nightly test-clients conformance demo chaos fleet fleet-nightly fuzz soak bench \
	bench-others h2spec nightly check audit deploy-tools deploy-check smoke docs docs-reference format protos stubs-current lock redis postgresql h2load clean no-environment

# The lock has wheels for these versions; a newer Python would compile grpcio for half an hour. Each candidate is run,
# since version managers put names on PATH that do not work.
PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && \
	echo $$python && break; done)

# Bytecode saves each of the many processes that the tests start a fifth of its start-up.
unexport PYTHONDONTWRITEBYTECODE

# protoc finds its plugin, and the tests their redis-server, on PATH. The minimal PATH of macOS and cron lacks them.
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/bin:/usr/local/bin:/opt/homebrew/bin

# $(call install,DEBIAN PACKAGE,COMMAND): installs the package as root on Debian, as in CI and containers, and otherwise
# prints the command. A Redis service started by its package does no harm: tests start their own servers on free ports.
install = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing $(1)…"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends $(1) >/dev/null; \
	else echo "Missing: $(1). Run '$(2)', then the same make target again." >&2; exit 1; fi

comma := ,
GO := $(shell command -v go)
NODE := $(shell command -v npm)
APT := $(shell command -v apt-get)
# The Python with which client tests start the service.
CLIENT_ENV = DEDUP_TEST_PYTHON="$(CURDIR)/.venv/bin/python"

# $(call generate,FOLDER)
generate = .venv/bin/python -m grpc_tools.protoc -I protos --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) protos/dedup/v1/dedup.proto

# In clients/node, after npm ci, which installs the generator.
node_stubs_current = (stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && \
	PATH="$$PWD/node_modules/.bin:$$PATH" buf generate -o "$$stubs" && diff -r src/gen "$$stubs/src/gen" || \
	{ echo "clients/node/src/gen is stale: run npm run generate" >&2; exit 1; })

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS="..." adds arguments to run, test, test-clients, conformance, demo, chaos, fleet, fuzz, soak, bench, deploy-check and lock.'
	@echo 'PYTHON=... selects the Python of a new .venv.'

run: .venv/run.stamp ## Start the service (ARGS="--store-url redis://127.0.0.1:6379")
	@exec .venv/bin/dedup-service serve --banner $(ARGS)

# Two test processes per core, since tests wait for timers and for servers to start about half of the time.
test: .venv/dev.stamp redis ## Run the tests (ARGS="-k claim" selects)
	.venv/bin/pytest -n $$((2 * $$(getconf _NPROCESSORS_ONLN))) --dist worksteal $(ARGS)

test-nightly: .venv/dev.stamp redis postgresql
	.venv/bin/pytest -m nightly -n $$(getconf _NPROCESSORS_ONLN) --dist worksteal

# Without Go or Node their client is skipped, and the last line says so.
test-clients: .venv/dev.stamp redis ## Test the Python, Go and Node clients against the live service
	.venv/bin/pytest -c clients/python/pyproject.toml clients/python/tests -n auto --dist worksteal $(ARGS)
	$(if $(GO),cd clients/go && PROTOC="$(CURDIR)/.venv/bin/python -m grpc_tools.protoc" ./generate.sh --check)
	$(if $(GO),cd clients/go && $(CLIENT_ENV) go vet ./... && $(CLIENT_ENV) go test -race ./...)
	$(if $(GO),cd examples/lucky_box/go && go vet ./...)
	$(if $(GO),cd examples/rewards/go && go vet ./...)
	$(if $(GO),cd benchmarks/loadgen && go vet ./...)
	$(if $(NODE),cd clients/node && npm ci --no-audit --no-fund && $(node_stubs_current) && $(CLIENT_ENV) npm test)
	@echo "Tested: Python$(if $(GO),$(comma) Go)$(if $(NODE),$(comma) Node).\
	$(if $(GO),, Go is missing: its client was NOT tested.)$(if $(NODE),, Node is missing: its client was NOT tested.)"

# Without Go or Node their guards are skipped, and the last line says so.
conformance: .venv/dev.stamp redis ## Check each HTTP guard, and a fleet of all, against the client contract
	$(if $(NODE),cd clients/node && npm ci --no-audit --no-fund && npm run build)
	$(if $(NODE),cd examples/rewards/node && npm ci --no-audit --no-fund)
	.venv/bin/pytest -m conformance tests/wire/conformance -n 2 $(ARGS)
	@echo "Checked: Python$(if $(GO),$(comma) Go)$(if $(NODE),$(comma) Node).\
	$(if $(GO),, Go is missing: its guard was NOT checked.)$(if $(NODE),, Node is missing: its guards were NOT checked.)"

demo: .venv/dev.stamp redis ## Show three clicks within a millisecond, without and with the service (ARGS="--rounds 50")
	@.venv/bin/python examples/lucky_box/demo.py $(ARGS)

chaos: .venv/dev.stamp redis ## Check the guarantees under faults for 3 minutes (ARGS="--seed 1")
	@.venv/bin/python -m tests.stress.chaos.run $(ARGS)

# Without Go or Node their services are left out, and the last line says so; --require go makes that an error.
fleet: .venv/dev.stamp redis postgresql ## Check that services of all languages do work once under faults (ARGS="--seed 1")
	@.venv/bin/python -m tests.stress.fleet.run $(ARGS)

fleet-nightly:
	@$(MAKE) --no-print-directory fleet ARGS="--seconds 300"

fuzz: .venv/dev.stamp ## Fuzz each parser for a minute; Linux (ARGS="--seconds 10 --seed 1")
	@.venv/bin/python -m tests.stress.fuzz.run $(ARGS)

soak: .venv/dev.stamp redis ## Run mixed load for 10 minutes and check for memory growth; Linux (ARGS="--engine native")
	@.venv/bin/python -m tests.stress.soak.run $(ARGS)

# Without Go, claims of fresh ids and batches are not measured, and the report says so.
bench: .venv/dev.stamp redis h2load ## Measure performance for 10 minutes; Linux (ARGS="--quick" for a 1-minute trial)
	@.venv/bin/python -m benchmarks.run $(ARGS)

# Shows that they run; their figures need the full forms, which docs/performance.md names.
bench-others: .venv/dev.stamp redis
	@for benchmark in scale coalescing startup workers; do .venv/bin/python -m "benchmarks.$$benchmark" --quick || exit; done
	@.venv/bin/python -m benchmarks.hostile_peers --scale 0.05
	@.venv/bin/python benchmarks/cancelled_calls.py --calls 2000

# Needs Go, which builds it from source.
h2spec: .venv/dev.stamp ## Check each engine's conformance to HTTP/2 for 3 minutes; needs Go
	@mkdir -p build/bin
	@GOBIN="$(CURDIR)/build/bin" go install github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible
	@PYTHONPATH=. .venv/bin/python scripts/h2spec.py

# About 40 minutes. A failure does not stop the later steps.
nightly: ## Run the long checks in turn: the rest of the tests, chaos, fleet, fuzz, soak, bench, h2spec
	@failed=""; for step in test-nightly chaos fleet-nightly fuzz soak bench bench-others $(if $(GO),h2spec); do \
		echo "=== $$(date '+%H:%M:%S') $$step ==="; \
		$(MAKE) --no-print-directory $$step ARGS= || failed="$$failed $$step"; \
	done; echo "=== $$(date '+%H:%M:%S') failed:$${failed:- none} ==="; [ -z "$$failed" ]

check: .venv/dev.stamp stubs-current ## Check lint, format, types, layers, contract, generated stubs, lock
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	MYPYPATH=clients/python:. .venv/bin/mypy clients/python/dedup clients/python/tests
	.venv/bin/lint-imports
	cd protos && ../.venv/bin/buf lint
	cd protos && ../.venv/bin/buf format -d --exit-code
	cd protos && ../.venv/bin/buf breaking --against baseline.json
	.venv/bin/python -m pip check

audit: .venv/pyvenv.cfg ## Check the locked packages for known vulnerabilities
	@.venv/bin/python scripts/audit.py

# Go builds from source: a minute or two the first time. The Debian package of promtool is unpacked, not installed,
# since installing it would start Prometheus.
deploy-tools: ## Install kustomize and helm (with Go) and promtool (with apt-get) into build/bin
	@mkdir -p build/bin
	$(if $(GO),GOBIN="$(CURDIR)/build/bin" go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.0)
	$(if $(GO),GOBIN="$(CURDIR)/build/bin" go install helm.sh/helm/v3/cmd/helm@v3.22.0)
	$(if $(APT),[ -x build/bin/promtool ] || (apt-get -qq update; cd build && apt-get -qq -o APT::Sandbox::User=root download prometheus && \
		dpkg-deb -x prometheus_*.deb prometheus && cp prometheus/usr/bin/promtool bin/))

deploy-check: .venv/dev.stamp ## Check the Dockerfile, manifests, charts and alerts (ARGS="--require helm")
	@PATH="$(CURDIR)/build/bin:$(PATH)" .venv/bin/python scripts/deploy_check.py $(ARGS)

smoke: .venv/pyvenv.cfg ## Install a clean copy with plain pip, claim twice, uninstall
	.venv/bin/python scripts/smoke.py

docs: .venv/docs.stamp ## Build the documentation into build/site and check its links
	.venv/bin/python scripts/reference.py --check
	.venv/bin/python scripts/build_docs.py

docs-reference: .venv/dev.stamp ## Regenerate the generated parts of the documentation
	.venv/bin/python scripts/reference.py

format: .venv/dev.stamp ## Format the code and the contract
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format
	cd protos && ../.venv/bin/buf format -w

protos: .venv/dev.stamp ## Regenerate the Python stubs
	$(call generate,clients/python)

stubs-current: .venv/dev.stamp
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && $(call generate,"$$stubs") && \
	diff -r -u -x __pycache__ -x __init__.py clients/python/dedup/v1 "$$stubs/dedup/v1" || \
	{ echo "generated stubs are stale: run make protos" >&2; exit 1; }

# Keeps locked versions unless ARGS has --upgrade or --upgrade-package. Resolves for the oldest supported Python.
# run.txt and docs.txt follow dev.txt, since all three are installed into one environment. The client is not locked: it
# is installed from this tree.
LOCK = "$$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-package dedup-client --annotation-style line --custom-compile-command "make lock" pyproject.toml

lock: .venv/pyvenv.cfg ## Regenerate requirements/*.txt (ARGS="--upgrade" or "--upgrade-package NAME")
	@tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && .venv/bin/python -m venv "$$tools" && \
	"$$tools/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 && \
	$(LOCK) --group dev -c requirements/constraints.txt -o requirements/dev.txt $(ARGS) && \
	$(LOCK) --group build -c requirements/dev.txt -o requirements/run.txt && \
	$(LOCK) --group docs -c requirements/dev.txt -o requirements/docs.txt

clean: ## Remove the environment, caches and builds
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# One environment for everything. dev.txt and docs.txt include run.txt, hence the second stamp.
.venv/%.stamp: requirements/%.txt pyproject.toml clients/python/pyproject.toml .venv/pyvenv.cfg
	@echo "Setting up the environment in .venv (about a minute)…" >&2
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		-e clients/python -e .
	@touch .venv/run.stamp $@

# Recreates an environment whose Python is gone, as after a system upgrade. On Debian, ensurepip is in a package of its
# own, and venv without it leaves a broken folder.
.venv/pyvenv.cfg: $(shell .venv/bin/python -c 'import pip' 2>/dev/null || echo no-environment)
	@[ -n "$(PYTHON)" ] || { echo "Missing: Python 3.11 to 3.14. Install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])') && \
		$(call install,$$package,sudo apt-get install $$package); }
	@$(PYTHON) -m venv --clear .venv

redis:
	@command -v redis-server >/dev/null || { $(call install,redis-server,$(if \
		$(filter Darwin,$(shell uname)),brew install redis,sudo apt-get install redis-server)); }

# Debian leaves the server off PATH.
postgresql:
	@command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
		$(call install,postgresql,$(if $(filter Darwin,$(shell uname)),brew install postgresql,sudo apt-get install postgresql)); }

h2load:
	@command -v h2load >/dev/null || { $(call install,nghttp2-client,sudo apt-get install nghttp2-client); }
