# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The imports and the closed form: what other systems than Linux, and the lowest versions, are tested with.
CORE_TESTS := tests/test_packaging.py tests/closed_form/test_curvature.py \
	tests/influence/test_captum_contract.py tests/conformance/test_laws.py tests/recovery/test_recovery.py \
	tests/influence/test_persistence.py

# All cores, one thread each: workers that share a core wait for one another's threads.
PARALLEL := -n auto --dist loadgroup

.PHONY: demo test coverage test-fast conformance test-core test-lowest test-quanda test-dattri lint types notebooks docs clean

demo: $(VENV)/.eval
	$(BIN)/stride-captum explain --task digits --out out/demo
	$(BIN)/stride-captum compare --task digits --preset smoke --measure all --out out/demo/compare

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not matrix"

# The lines that `make test` does not run; counting them takes half as long again.
coverage: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not matrix" --cov --cov-report=term

# Every method against every law, for every loss and for positions; and the benchmarks at small sizes.
conformance: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m matrix

# While you work: little more than a minute on two cores.
test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not matrix"

test-core: $(VENV)/.eval
	$(BIN)/python -m pip install --quiet --editable ".[vision]" "pytest>=8"
	$(BIN)/python -m pytest $(CORE_TESTS)

# The lowest versions that pyproject.toml promises, of what it names itself. The packages that those need are
# the newest, so that old releases warn of them: no warning is an error here.
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -W default $(CORE_TESTS) tests/evaluation/cli/test_output.py \
		tests/evaluation/tasks/test_tasks.py

# The plugins, each with the library that it plugs into. quanda needs captum 0.8 and numpy 1: what holds
# with the newest captum is tested there again.
test-quanda: .venv-quanda/.installed
	OMP_NUM_THREADS=1 .venv-quanda/bin/python -m pytest $(PARALLEL) tests/in_quanda \
		tests/influence/test_captum_contract.py tests/conformance/test_laws.py tests/influence/test_top_k.py \
		tests/system/test_preserve_state.py

test-dattri: .venv-dattri/.installed
	.venv-dattri/bin/python -m pytest tests/in_dattri

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The types are checked on what is installed, where adapters/ and evaluation/ are sub-packages.
types: $(VENV)/.dev
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p stride_captum

# One thread: a small transformer is forty times slower where two threads wait for a busy core.
notebooks: $(VENV)/.tutorials
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/in_notebooks

# The site is built from the package as it installs, where adapters/ and evaluation/ are sub-packages.
docs: $(VENV)/.docs
	rm -rf build/docs
	$(BIN)/python -m pip install --quiet --no-deps --target build/docs .
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=build/docs $(BIN)/mkdocs build --strict
	@echo "The site: out/docs/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[eval,kronfluence]"
	touch $@

$(VENV)/.dev: $(VENV)/.eval
	$(BIN)/python -m pip install --quiet --editable ".[eval,vision,kronfluence,cleanlab,dev]"
	touch $@

$(VENV)/.tutorials: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable ".[tutorials]"
	touch $@

$(VENV)/.docs: $(VENV)/.eval
	$(BIN)/python -m pip install --quiet --editable ".[eval,docs]"
	touch $@

.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable ".[eval,vision,kronfluence]" "pytest>=8"
	touch $@

# A layer over .venv: packages that the extra wants in another version shadow those below, torch is shared.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-%/.installed: $(VENV)/.dev pyproject.toml
	$(BIN)/python -m venv --clear .venv-$*
	$(BIN)/python $(SITE) > "$$(.venv-$*/bin/python $(SITE))/layer.pth"
	.venv-$*/bin/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf build out *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
