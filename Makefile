# make demo                 train a small Llama with backend="quartet" beside plain Inductor (a few minutes on two cores)
# make check                before each commit: ruff, mypy, and the tests that find most a second (four minutes at most)
# make test                 the test suite
# make test TORCH=2.15.0    the same with another PyTorch, in a virtual environment of its own
# make fuzz N=1000          so many random models through the passes, and calls through the optimizers
# make zoo                  a training step of forty architectures from transformers, timm, diffusers and peft
# make examples             the programs for other people's tools, as shipped
# make test-cutlass         compile and check every Blackwell kernel of the table (nvcc; an hour on two cores)
# make figures              README's tables and plot from the last demo
# make site                 the documentation as a site, in site/
# make lint | bench | docs  ruff and mypy | the step benchmark on a CPU | docs/recipes.md anew

PYTHON ?= python3
TORCH  ?=
VENV   ?= .venv$(addprefix -,$(TORCH))
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
COMMA  := ,
EXTRAS := test,demo,clients$(if $(TORCH),,$(COMMA)zoo)# a torchvision, which timm needs, is made for one PyTorch only
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt

named  = $(patsubst %,tests/$1/test_%.py,$2)
QUICK  := tests/passes tests/quartet tests/runtime $(filter-out tests/test_packaging.py,$(wildcard tests/test_*.py)) \
          $(filter-out $(call named,kernels,build_% cpu_% cutlass_% triton_%),$(wildcard $(call named,kernels,*))) \
          $(call named,lowering,blackwell blackwell_library cost fp8 grouped_products int8 op opcheck operands triton) \
          $(call named,scenarios,cells layers masks recipe_formulas strict) $(call named,caches,cache_key) \
          $(call named,optim,state_format optimizers) $(call named,direct,weights derivatives)

.PHONY: install demo check test fuzz zoo examples test-cutlass lint bench docs figures site clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/;/^triton==/d)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/train_llama.py --out demo-out --seeds 3 $(ARGS)

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" $(QUICK) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

fuzz: $(STAMP)
	QUARTET_FUZZ=$(or $(N),1000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/fuzz $(ARGS)

zoo: $(STAMP)
	QUARTET_ZOO=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/zoo $(ARGS)

examples: $(STAMP)
	QUARTET_EXAMPLES=all $(BIN)/python -m pytest -q -n 0 tests/examples/test_programs_for_tools.py $(ARGS)

test-cutlass: $(STAMP)
	QUARTET_TEST_TABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels/test_cutlass_kernels.py $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu_step.py $(ARGS)

docs: $(STAMP)
	$(BIN)/quartet recipes --markdown > docs/recipes.md.new
	mv docs/recipes.md.new docs/recipes.md

figures: $(STAMP)
	$(BIN)/python benchmarks/figures.py $(if $(wildcard demo-out/result.json),--demo demo-out/result.json)

site: $(STAMP)
	$(PIP) --no-build-isolation --editable '.[docs]'
	rm -rf docs/gallery
	$(BIN)/python docs/site/gallery.py docs/gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info demo-out bench-out site docs/gallery
