# make run    set everything up and serve on port 8000 (PORT=... or LIMPID_PORT)
# make test   set everything up and run the tests
# TORCH_INDEX=URL takes torch and torchvision from another package index, for example one of CPU-only builds.

PYTHON ?= python3
TORCH_INDEX ?=
PHOTOS ?= ../shared/data

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

TORCH_FROM := $(if $(wildcard $(VENV)/torch.stamp),$(shell cat $(VENV)/torch.stamp),$(TORCH_INDEX))
ifneq ($(TORCH_INDEX),$(and $(TORCH_INDEX),$(TORCH_FROM)))
$(error torch is in $(VENV) already, from another index; remove $(VENV) to take it from this one)
endif

.PHONY: run test lint format bench cost evaluate clean

run: $(VENV)/run.stamp
	$(BIN)/python -m service serve $(if $(PORT),--port $(PORT))

test: $(VENV)/dev.stamp $(VENV)/debian.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp
	$(BIN)/python -m tests.bench.speed
	$(BIN)/python -m tests.bench.latency
	$(BIN)/python -m tests.bench.growth
	$(BIN)/python -m tests.bench.effort
	$(BIN)/python -m tests.bench.gpu

cost: $(VENV)/run.stamp
	$(BIN)/python -m service.codec.cost

evaluate: $(VENV)/dev.stamp
	$(BIN)/python -m model_store.evaluation peers --photos $(PHOTOS)/eval
	$(BIN)/python -m model_store.evaluation cascade --photos $(PHOTOS)/eval
	$(BIN)/python -m model_store.evaluation model --photos $(PHOTOS)/eval
	$(BIN)/python -m model_store.evaluation naming --photos $(PHOTOS)/eval
	$(BIN)/python -m model_store.evaluation generations --photos $(PHOTOS)/eval
	$(BIN)/python -m model_store.evaluation report

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, PYTHON= names one")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
	echo '$(TORCH_INDEX)' > $@

$(VENV)/run.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable .
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable '.[dev,evaluation,otel,ray]'
	touch $@ $(VENV)/run.stamp

$(VENV)/debian.stamp: tests/debian.sh | $(VENV)/bin/python
	tests/debian.sh $(VENV)/debian
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
