# Set-up is part of every target: a fresh machine needs nothing but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fast slow faults lint docs figures bench bench-gpu bench-scale clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready    ## train the bundled character on the embedded base and look at it
	$(BIN)/sdlora train --config configs/demo.toml --out runs/demo

test: fast slow      ## all tests

fast: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'not slow and not large' --durations=5

slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'slow and not large' --durations=5

faults: .venv/ready  ## thousands of crashes, kills, power cuts and flipped bits, and what came of them (docs/measured.md)
	$(BIN)/python -m pytest -q -s -m large --durations=0

lint: .venv/ready    ## ruff, and mypy in strict mode over sdlora and webui
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready    ## write docs/settings.md and its JSON Schema from the settings' own fields
	$(BIN)/python tools/make_docs.py

figures: .venv/ready ## measure what is learnt on the embedded base (docs/measured.md)
	$(BIN)/python bench/learning.py

bench: .venv/ready   ## the training step beside PEFT's, on 1.5's UNet with random weights; two quiet cores, 20 GB (docs/measured.md)
	PYTHONPATH=. $(BIN)/python bench/speed.py --write

WHEELS ?= wheels
bench-gpu:           ## all that only a GPU shows; its Python has torch, the folder WHEELS the rest (docs/measured.md)
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	if ls $(WHEELS)/*.whl > /dev/null 2>&1; then .venv-gpu/bin/python -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl; fi
	PYTHONPATH=. .venv-gpu/bin/python bench/gpu.py --write

bench-scale: .venv/ready ## memory and speed against pictures and rank (docs/measured.md)
	PYTHONPATH=. $(BIN)/python bench/scale.py --write

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info
