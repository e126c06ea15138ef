PYTHON ?= python
export PYTHONDONTWRITEBYTECODE ?= 1
# Processes that tests are spread over; 0 runs them in one.
WORKERS ?= 2
BROKER_WORKERS ?= 3
# Where the kill sweeps write what they found; empty for nowhere.
ADAPTD_CRASH_RESULT ?= benchmarks/results/crash.json

.PHONY: check test broker crash bench docs format

check:  ## format, lint, types, import arrows, generated docs
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_arrows.py tests/test_budgets.py
	$(PYTHON) -m engine.reference --check

test:  ## the default tier: no broker, no kills, no GPU
	$(PYTHON) -m pytest -n $(WORKERS) -m "not broker and not crash" tests

broker:  ## against a real Apache Kafka; one for each of three workers, since most of the time is spent waiting
	$(PYTHON) -m pytest -n $(BROKER_WORKERS) -m broker tests/broker

crash:  ## 1,000 kills on files and on a real Kafka; ADAPTD_CRASH_KILLS=100 or ADAPTD_CRASH_SECONDS=300 for fewer
	ADAPTD_CRASH_RESULT="$(ADAPTD_CRASH_RESULT)" $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m crash tests/crash

bench:  ## every benchmark, results into benchmarks/results
	$(PYTHON) -m benchmarks

docs:  ## the generated policy reference
	$(PYTHON) -m engine.reference

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
