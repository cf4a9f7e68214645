# make demo    set up, train a small GPT on Python's own source with all cores, check its bits against one worker
# make check   set up, run linters and the tests that stay in one process, in a few minutes
# make test    set up, run linters and all tests
# make soak    kill workers at random for SECONDS=600, and compare bits; HOSTS=1: of which each is a host
# make bench   set up the peers, run the benchmarks (about 45 minutes on 2 cores)
# make clean   remove what these made

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo check check-quick check-memory check-bits lint test soak bench clean

demo: .venv/ready
	$(BIN)/lightwork run -n auto --set device=cpu examples/gpt_stdlib.py --digests build/demo/digests.json
	$(BIN)/python examples/gpt_stdlib.py --compare build/demo/digests.json

check: .venv/ready
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target check-bits check-quick check-memory

check-quick: lint
	$(BIN)/python -m pytest -q tests/architecture tests/pure tests/contract tests/data

# Two halves of tests/engine: where things lie in memory, and all else.
MEMORY := memory or device or disk or sharded or gpus or holdings

check-memory: .venv/ready
	$(BIN)/python -m pytest -q tests/engine -k "$(MEMORY)"

check-bits: .venv/ready
	$(BIN)/python -m pytest -q tests/engine -k "not ($(MEMORY))"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -q $(addprefix --ignore=tests/,architecture pure contract data engine)

SECONDS ?= 600

soak: .venv/ready
	$(BIN)/python benchmarks/soak.py --seconds $(SECONDS) $(if $(HOSTS),--hosts)

bench: .venv/bench-ready
	$(BIN)/python benchmarks/bench.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,examples]'
	touch $@

.venv/bench-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	-DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation deepspeed==0.19.8
	touch $@

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
