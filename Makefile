# SPDX-License-Identifier: Apache-2.0
# Everything needs only Python 3.11, make and git; the rest goes into .venv.

PYTHON ?= python3
# Processes that `make test` runs in: one more than there are processors, because some tests wait.
JOBS ?= $(shell expr $$(nproc) + 1)
# Branch coverage in percent that `make test` asks for. These figures may only grow.
COVERAGE_PROTOCOL := 100
COVERAGE_METADATA := 98.8
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --require-hashes

# `make run SOURCE=… DEST=…` clones a real disk; without them, a sample one.
ifeq ($(origin SOURCE)$(origin DEST),undefinedundefined)
SAMPLE := run/source.img
SOURCE := $(SAMPLE)
DEST := run/dest.img
endif

.PHONY: run check test test-long suite measured sim bench bench-cache bench-commit bench-stack bench-hydration bench-open bench-images bench-sources fleet-sim crash kill-test torture upgrade-loop passthrough-bugs mutants fuzz fuzz-wire fuzz-wire-guided fuzz-fast rot lock wheel clean hit-ratio attack attack-stalled docs docs-reference help

help:
	@echo 'make run [SOURCE=disk|URL|qemu:… DEST=disk] [ARGS=…]   serve a clone over NBD, hydrate it'
	@echo 'make test          the suite                  make check   format, lint, types, walls'
	@echo 'make test-long     what takes longer: SIGKILL under load, long histories, packages, tutorials'
	@echo 'make bench [ARGS=--quick]  against the C servers; what a stack and a commit cost; latency beside copies'
	@echo 'make attack [ARGS=--quick]  what hostile clients cost a quiet one; also attack-stalled'
	@echo 'make bench-stack   one of these alone: also bench-cache, -commit; bench-hydration, bench-open, bench-images, bench-sources'
	@echo 'make hit-ratio [ARGS=…]  of the cache policy, beside LRU and the best possible one'
	@echo 'make sim [SEED=n] [SECONDS=60] [CRASHES=n] [FROM=n] [RIG=clone]  the server in memory, power cuts'
	@echo 'make crash         the crash suites without their bounds: new seeds, many more orders'
	@echo 'make kill-test     SIGKILL under load, over and over'
	@echo 'make torture       databases under power cuts (as root): which of them keep what they promise'
	@echo 'make upgrade-loop [ARGS=…]  hand-overs to a new process under load, over and over'
	@echo 'make fleet-sim     one image and many machines, in simulated time'
	@echo 'make boot-test     a machine boots from a clone of a qcow2 on a web server and in S3 (without KVM ten minutes)'
	@echo 'make ceph-test     RBD images of a real cluster of Ceph as sources (as root, a minute and a half)'
	@echo 'make vm-test       the kernel as a client, and systemd, in virtual machines'
	@echo 'make passthrough-bugs  the steps of the two bugs of dm-cache, here'
	@echo 'make mutants       every deliberate bug must be caught'
	@echo 'make fuzz [SECONDS=60 SEED=0]  metadata that nobody would write; also rot, bit by bit'
	@echo 'make fuzz-fast [ARGS=…]  the compiled fast path under AddressSanitizer, 10 million messages'
	@echo 'make docs          site and man pages: build/docs    make docs-reference  commands anew, from their help'
	@echo 'make fuzz-wire [SECONDS=60 SEED=0]  damaged conversations in the NBD protocol; also fuzz-wire-guided'
	@echo 'make wheel         dist/*.whl                 make lock    resolve the lock files anew'
	@echo 'make dist          wheel, sdist, checked      make deb     dist/*.deb; make deb-test: in a clean Debian'
	@echo 'make clean         what was built, cached or sampled'

# ---- the virtual environment -------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or later is needed; name one with PYTHON=…' >&2; exit 1; }
	@scripts/ensure-venv-module $(PYTHON)
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# A .pth instead of an editable install: no build backend is needed to run.
.venv/run.stamp: requirements.lock pyproject.toml | $(BIN)/python
	@echo 'installing the locked packages into .venv'
	@$(PIP) -r requirements.lock
	@$(BIN)/python -m scripts.link_project
	@touch $@

.venv/fast.stamp: $(wildcard nbdtarget/fast/*.pyx nbdtarget/fast/*.pxd nbdtarget/fast/*.h nbdtarget/fast/nbdtarget_fast/*.pxi) scripts/build_fast.py requirements-fast.lock .venv/run.stamp
	@echo 'building the compiled fast path'
	@{ $(PIP) -r requirements-fast.lock && $(BIN)/python -m scripts.build_fast; } \
	    || echo 'nbdtarget works without it, and is slower'
	@touch $@

.venv/dev.stamp: requirements-dev.lock .venv/run.stamp .venv/fast.stamp
	@echo 'installing the locked development packages into .venv'
	@$(PIP) -r requirements-dev.lock
	@touch $@

.venv/docs.stamp: requirements-docs.lock .venv/dev.stamp
	@echo 'installing the locked packages for the documentation into .venv'
	@$(PIP) -r requirements-docs.lock
	@touch $@

# ---- what a user runs --------------------------------------------------------------------

run: .venv/run.stamp .venv/fast.stamp
ifdef SAMPLE
	@$(BIN)/python -m scripts.make_sample_source $(SAMPLE)
endif
	@test -n '$(SOURCE)' -a -n '$(DEST)' || { \
	    echo 'make run takes both SOURCE= and DEST=, or neither' >&2; exit 2; }
	@$(BIN)/nbdtarget clone '$(SOURCE)' '$(DEST)' $(ARGS)

# ---- the gate ----------------------------------------------------------------------------

check: .venv/dev.stamp
	@$(BIN)/ruff format --check --quiet . || { echo 'make check: run ruff format' >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

SUITE := $(BIN)/python -m pytest -q --numprocesses=$(JOBS) --dist=worksteal

# With ARGS: only what they choose, and nothing is measured.
test: .venv/dev.stamp
	@scripts/install-clients
	@scripts/newer-clients build/newer-clients
	@scripts/unpack-prometheus build/prometheus
ifdef ARGS
	@$(SUITE) $(ARGS)
else
	@$(MAKE) --no-print-directory --jobs=2 suite measured
endif

# What takes longer than the rest: CI runs it, too.
test-long: .venv/dev.stamp
	@scripts/install-clients chromium
	@scripts/unpack-prometheus build/prometheus
	@$(SUITE) -m long

# Compiled modules are kept: a fifth of the time would go into compiling the same ones, in each
# worker and in each server that a test starts.
suite measured test-long: export PYTHONDONTWRITEBYTECODE =

suite: .venv/dev.stamp
	@$(SUITE) -m 'not measured and not long'

# Beside the suite and in one process: the quick tests of protocol/ and metadata/, which the
# suite leaves out.
measured: .venv/dev.stamp
	@scripts/measured-tests $(COVERAGE_PROTOCOL) $(COVERAGE_METADATA)

# ---- on demand ---------------------------------------------------------------------------

bench: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench $(ARGS)

bench-cache: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_cache $(ARGS)

bench-commit: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_commit $(ARGS)

bench-stack: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_stack $(ARGS)

bench-hydration: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_hydration $(ARGS)

# A clone of a qcow2 image, against qemu-img convert.
bench-images: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_qcow2 $(ARGS)

# A clone of an image on a distant web server, against nbdkit's curl plugin.
bench-sources: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_sources $(ARGS)

# One image and many machines, in simulated time: ARGS='--clones 100 --trace FILE'.
fleet-sim: .venv/dev.stamp
	@$(BIN)/python -m scripts.fleet_sim $(ARGS)

bench-open: .venv/dev.stamp
	@$(BIN)/python -m scripts.bench_open $(ARGS)

# The cache policy beside LRU and the best possible: ARGS='--trace FILE', '--help'.
hit-ratio: .venv/dev.stamp
	@$(BIN)/python -m scripts.hit_ratio $(ARGS)

sim: .venv/dev.stamp
	@$(BIN)/python -m scripts.sim $(if $(SEED),--seed $(SEED)) $(if $(FROM),--from $(FROM)) \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(CRASHES),--crashes $(CRASHES)) \
	    $(if $(RIG),--rig $(RIG)) $(ARGS)

# The crash suites without their bounds: make crash ARGS='-k clone'.
crash: .venv/dev.stamp
	@CRASH_DEEP=1 $(BIN)/python -m pytest -q tests/crash -o faulthandler_timeout=0 $(ARGS)

# What hostile clients cost a quiet one: a table.
attack: .venv/dev.stamp
	@$(BIN)/python -m scripts.attack $(ARGS)

# 3,000 clients that stall: ARGS='--quick', '--greedy'.
attack-stalled: .venv/dev.stamp
	@$(BIN)/python -m scripts.attack_stalled $(ARGS)

kill-test: .venv/dev.stamp
	@$(BIN)/python -m scripts.kill_loop $(ARGS)

# SQLite and PostgreSQL under power cuts, as root: ARGS='--only sqlite --cuts 200'.
torture: .venv/dev.stamp
	@$(BIN)/python -m scripts.torture_databases $(ARGS)

# 100 hand-overs with clients that verify.
upgrade-loop: .venv/dev.stamp
	@$(BIN)/python -m scripts.upgrade_loop $(ARGS)

# By the kernel's own steps: passthrough over a cache that may be dirty is refused.
passthrough-bugs: .venv/dev.stamp
	@$(BIN)/python -m scripts.passthrough_bugs $(ARGS)

# A machine that boots from a clone of a qcow2 image on a web server and in S3, and what may go wrong meanwhile.
.PHONY: boot-test
boot-test: .venv/dev.stamp
	@$(BIN)/python -m scripts.boot_test $(ARGS)

# RBD images of a real cluster of Ceph on this machine, as sources.
.PHONY: ceph-test
ceph-test: .venv/dev.stamp
	@$(BIN)/python -m scripts.ceph_test $(ARGS)

# Kernel clients, and a real systemd, in virtual machines: ARGS='--only NAME', '--list'.
.PHONY: vm-test
vm-test: docs
	@$(BIN)/python -m scripts.vm_test $(ARGS)

# Every deliberate bug must be caught: ARGS='--only NAME', '--list', '--jobs N'.
mutants: .venv/dev.stamp
	@$(BIN)/python -m scripts.mutants $(ARGS)

# Metadata that nobody would write: make fuzz SECONDS=600 SEED=1, or CASES=1 to see one again.
fuzz: .venv/dev.stamp
	@$(BIN)/python -m scripts.fuzz_metadata --seconds $(or $(SECONDS),60) \
	    --seed $(or $(SEED),0) $(if $(CASES),--cases $(CASES)) $(ARGS)

# Damaged conversations in the NBD protocol; a failing seed is printed with what replays it.
fuzz-wire: .venv/dev.stamp
	@$(BIN)/python -m scripts.fuzz_wire --seconds $(or $(SECONDS),60) \
	    --seed $(or $(SEED),0) $(if $(CASES),--cases $(CASES)) $(ARGS)

# The same, chosen by a fuzzer that looks which code runs; it needs atheris.
fuzz-wire-guided: .venv/dev.stamp
	@$(BIN)/python -m scripts.fuzz_wire_guided --seconds $(or $(SECONDS),60) $(ARGS)

# The compiled fast path under AddressSanitizer: ARGS='--messages 100000 --seed 1'.
fuzz-fast: .venv/dev.stamp
	@$(BIN)/python -m scripts.fuzz_fast $(ARGS)

# Every bit of every block that is read, its padding too: some minutes.
rot: .venv/dev.stamp
	@ROT_DEEP=1 $(BIN)/python -m pytest -q tests/metadata/clone/test_rot.py \
	    tests/metadata/cache/test_rot.py $(ARGS)

# The site and the man pages. A warning is an error.
SPHINX := $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d build/docs/doctrees

docs: .venv/docs.stamp
	@$(SPHINX) -b html docs build/docs/html
	@$(SPHINX) -b man docs build/docs/man
	@echo 'build/docs/html/index.html, build/docs/man'

# The pages of the commands are written anew from the help texts.
docs-reference: .venv/dev.stamp
	@$(BIN)/python -m scripts.command_reference
	@$(BIN)/python -m scripts.metrics_reference

wheel: .venv/dev.stamp
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist

# A wheel and a source archive, as an index takes them.
.PHONY: dist
dist: .venv/dev.stamp
	@$(BIN)/python -m build --no-isolation --outdir dist
	@$(BIN)/python -m twine check --strict dist/*.whl dist/*.tar.gz
	@$(BIN)/check-wheel-contents dist/*.whl

# A Debian package that carries its libraries: dist/*.deb.
.PHONY: deb deb-test
deb: docs
	@$(BIN)/python -m scripts.build_deb $(ARGS)

# It is installed, used, updated and purged in a clean Debian; needs root.
deb-test: docs
	@$(BIN)/python -m scripts.deb_test

# No header and no index address: a lock file names packages and hashes, not where we got them.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --no-header --no-annotate --no-emit-index-url pyproject.toml

lock: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --output-file requirements.lock
	@$(COMPILE) --group dev --output-file requirements-dev.lock
	@$(subst pyproject.toml,--group pyproject.toml:fast,$(COMPILE)) --output-file requirements-fast.lock
	@$(COMPILE) --group docs --constraints requirements-dev.lock --output-file requirements-docs.lock

clean:
	@rm -rf build dist run .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@rm -f bench-*.json .coverage
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
