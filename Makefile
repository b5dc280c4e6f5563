# make demo    the whole workflow in a few minutes: draw pictures, pack, train, evaluate, report
# make test    the quick tests, which take minutes
# make test-all      all tests, including those that start trainers, browsers, servers, npm or containers
# make test-spread   the quick tests as on other machines: without AVX-512, with a busy core, with other Pythons
# make lint    check style and types
# make bench   measure the throughput of each stage on the demo's pictures
# make chaos   check that runs killed 200 times give the same result as undisturbed ones
# make bucket  check that runs from a bucket, through 200 faults and 50 kills, give the same result as local ones
# make faults  pack and train while each file-system call fails in turn; takes hours
# make gpu     checks that need a GPU: tests, goals, sweeps, accuracy; DATA=shards chooses your data; parts below
# make lock    resolve the dependencies of pyproject.toml into the exact versions of the image and of .venv
# make release build and check wheel, sdist, SBOM and checksums of the last commit in dist/
# make image   build the container image alexnet-train for NVIDIA GPUs or, with TARGET=cpu and TORCH_INDEX, for CPUs
# make images  build the images for x86-64 and arm64, see docker/compose.images.yaml
# make image-test   test the image and compose.yaml on a real Docker engine
# make setup   only create the environment in .venv, which the other targets do when needed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' pipeline/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*')
# pillow-simd replaces pillow of the same version.
PILLOW := 12.1.1
PILLOW_SIMD := pillow-simd==$(PILLOW).post0
# The libraries that decode FORMATS (pipeline/packing/codecs.py). Without the flags, a build omits those it lacks.
PILLOW_HEADERS := jpeglib.h zlib.h webp/decode.h webp/demux.h webp/mux.h tiffio.h lcms2.h
PILLOW_PACKAGES := libjpeg-dev zlib1g-dev libwebp-dev libtiff-dev liblcms2-dev
PILLOW_FLAGS := -C webp=enable -C tiff=enable -C lcms=enable
AVX2 := $(shell grep -qs avx2 /proc/cpuinfo && echo -mavx2)

.PHONY: setup demo test test-all test-spread test-avx2 test-busy lint bench chaos bucket faults
.PHONY: lock release image images image-test
.PHONY: gpu gpu-tests gpu-model gpu-forms gpu-loader gpu-train gpu-start gpu-sweep-loader gpu-sweep-batch gpu-peers gpu-accuracy

setup: $(VENV)/.ready

demo: setup
	$(BIN)/alexnet-train demo

# Each of these processes has a net and a loader of its own. The tests of a file share what its fixtures make.
WORKERS ?= 2
PYTEST = $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile
QUICK := -m "not slow"

test: setup
	$(PYTEST) $(QUICK)

test-all: setup
	$(PYTEST)

# QUICK= runs all tests. PYTHONS are commands on the PATH.
PYTHONS ?= python3.12 python3.13
test-spread: test-avx2 test-busy $(PYTHONS:%=test-%)

test-avx2: setup
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(QUICK)

test-busy: setup
	while :; do :; done & busy=$$!; trap "kill $$busy" EXIT; $(PYTEST) $(QUICK)

test-python%:
	$(MAKE) test PYTHON=python$* VENV=.venv-$*

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy pipeline model trainer tools setup.py docker/grafana/*.py

# The preset `paper` can also be built from torch's own layers, for comparison.
bench: demo
	$(BIN)/alexnet-train bench all --data runs/demo/shards --input runs/demo/pictures --recipe demo --preset paper --gates

chaos: DATA ?= runs/chaos-data
chaos: setup
	test -e $(DATA)/dataset.json || { \
		$(BIN)/alexnet-train draw-pictures --out $(DATA)-pictures --train 6 --val 2 && \
		$(BIN)/alexnet-train make-shards --input $(DATA)-pictures --out $(DATA) --size 80; }
	$(BIN)/python tests/endurance/chaos.py --data $(DATA) --record runs/chaos.jsonl

bucket: setup
	$(BIN)/python tests/endurance/bucket.py --record runs/bucket.jsonl

faults: setup
	$(BIN)/python tests/endurance/faults.py packing
	$(BIN)/python tests/endurance/faults.py training
	$(BIN)/python tests/endurance/faults.py continuing

# Each part should take at most ten minutes on an H200 with 16 cores, counting its runs and a minute for each compilation
# and start; none has been timed there yet. The time of gpu-accuracy depends on DATA. Each stage's line is written to
# RECORD as soon as it is measured. Tests, gates and --within fail if something falls short; `make --keep-going gpu`
# continues with the other parts.
gpu: gpu-tests gpu-model gpu-forms gpu-loader gpu-train gpu-start gpu-sweep-loader gpu-sweep-batch gpu-peers gpu-accuracy
gpu-%: DATA ?= runs/demo/shards
gpu-%: RECORD ?= runs/gpu.jsonl
gpu-%: BENCH = $(BIN)/alexnet-train bench
gpu-%: GIVEN = --data $(DATA) --device cuda --recipe fast --batch 1024 --record $(RECORD) --runs 3 --seconds 3 --limit 400

gpu-tests: setup # 180 s
	$(BIN)/pytest -m gpu $$(grep --recursive --files-with-matches --include='test_*.py' 'mark\.gpu' tests)

gpu-model: setup # 5 × 12 s, 3 compilations
	$(BENCH) model $(GIVEN) --gates

gpu-forms: setup # 6 × 12 s, 6 compilations
	$(BENCH) forms $(GIVEN)

gpu-loader: setup # 5 × 12 s, and tuning of JPEG engine share and threads
	$(BENCH) read loader $(GIVEN) --gates

gpu-train: setup # 3 × 12 s, 4 compilations, and saving
	$(BENCH) train save $(GIVEN) --gates --trace $(RECORD:.jsonl=.json)

gpu-start: setup # 6 starts, 5 of them with a compilation
	$(BENCH) start memory $(GIVEN) --runs 1 --gates

gpu-sweep-loader: setup # 15 × 12 s
	$(BENCH) loader $(GIVEN) --sweep hw-decoder-load 0 0.2 0.35 0.5 0.65 0.8 1
	$(BENCH) loader $(GIVEN) --sweep threads 4 8 12 16
	$(BENCH) loader $(GIVEN) --sweep prefetch 1 2 3 4

gpu-sweep-batch: setup # 5 × 12 s, 5 compilations
	$(BENCH) model $(GIVEN) --sweep batch 128 256 512 1024 2048

gpu-peers: setup # 9 × 12 s, and 8 starts
	$(if $(wildcard .loader-peers),$(BENCH) peers $(GIVEN) --gates --loader-peers .loader-peers/bin/python,@echo 'skipped: run make .loader-peers first')

gpu-accuracy: setup
	$(BIN)/alexnet-train compare-recipes fast code2012 --data $(DATA) --device cuda --within 1

# Grafana's types and the TypeScript compiler, with which tests/docker/test_dashboard.py checks the dashboard.
test-all: $(if $(shell command -v npm),.npm/.ready)
.npm/.ready: Makefile
	npm install --prefix $(@D) --no-save --no-audit --no-fund @grafana/schema@11.6.16 typescript@5.8.3 && touch $@ || \
		echo "the dashboard's types are not checked: npm could not fetch them"

# Other packers, for `alexnet-train bench pack --pack-peers .pack-peers/bin/python` to compare with.
.pack-peers:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet img2dataset==1.47.0 pillow==12.1.1

# Other input pipelines, for `alexnet-train bench peers --loader-peers .loader-peers/bin/python` to compare with. They
# conflict with img2dataset's webdataset. On Debian 12 they need, in addition to .venv's packages:
#     apt-get install libavdevice59 pkg-config libopencv-dev libturbojpeg0-dev
# The first is FFmpeg, with which SPDL decodes; FFCV is compiled with the others, and skipped without them.
.loader-peers:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0 pillow==12.1.1 numpy==2.1.3 timm==1.0.31 \
		webdataset==1.0.2 spdl==0.8.0 litdata==0.2.76 mosaicml-streaming==0.13.0 || { rm -r $@; exit 1; }
	$@/bin/pip install --quiet numba==0.68.1 opencv-python-headless==4.14.0.94 pytorch-pfn-extras==0.9.0 \
		fastargs==1.2.0 terminaltables==3.1.10 assertpy==1.1 psutil==7.2.2 || { rm -r $@; exit 1; }
	$@/bin/pip install --quiet --no-deps ffcv==1.0.2 || echo "FFCV is skipped: it could not be compiled"

# uv keeps the versions that are in the files, unless pyproject.toml excludes them or UPGRADE=--upgrade is given. The
# versions for arm64 are the same, and the hashes are those of all platforms.
UV_LOCK = $(BIN)/uv pip compile --quiet --custom-compile-command 'make lock' --python-version 3.11 $(UPGRADE)
IMAGE_LOCK = $(UV_LOCK) --generate-hashes --python-platform x86_64-manylinux_2_28
PROJECT_LOCK = $(IMAGE_LOCK) --extra s3 --extra tensorboard --no-emit-package pillow pyproject.toml
# A page or a folder of torch's CPU builds.
TORCH_WHEELS ?= $(or $(PIP_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)
lock: setup
	$(PROJECT_LOCK) --output-file docker/requirements-cuda.txt
	torch=$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' docker/requirements-cuda.txt) && echo "torch==$$torch+cpu" | \
		$(PROJECT_LOCK) - --constraint docker/requirements-cuda.txt --find-links $(TORCH_WHEELS) --output-file docker/requirements-cpu.txt
	printf '%s\n' setuptools pybind11 | \
		$(IMAGE_LOCK) - --constraint docker/requirements-cuda.txt --output-file docker/requirements-build.txt
	printf '%s\n' '$(PILLOW_SIMD); platform_machine == "x86_64"' 'pillow==$(PILLOW); platform_machine != "x86_64"' | \
		$(UV_LOCK) - --generate-hashes --universal --output-file docker/requirements-pillow.txt
	cp .ci/requirements.txt $(VENV)
	echo pillow==$(PILLOW) | $(UV_LOCK) pyproject.toml - --universal --extra dev \
		--constraint docker/requirements-cuda.txt --no-emit-package triton --output-file $(VENV)/requirements.txt
	@# An unchanged file keeps its time, after which $(VENV) would be made again.
	cmp -s $(VENV)/requirements.txt .ci/requirements.txt || cp $(VENV)/requirements.txt .ci

release: setup
	VENV=$(VENV) .ci/release

image: TARGET ?= cuda
image:
	DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile -t alexnet-train -t alexnet-train:$(TARGET) \
		--build-arg TARGET=$(TARGET) --build-arg CPU_FLAGS=$(AVX2) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$(REVISION) --build-arg TORCH_INDEX=$(TORCH_INDEX) $(BUILD_OPTIONS) .

images:
	VERSION=$(VERSION) REVISION=$(REVISION) docker compose -f docker/compose.images.yaml build $(BUILD_OPTIONS)

image-test: setup
	TEST_IMAGE=alexnet-train $(BIN)/pytest -m image tests/docker

$(VENV)/.ready: pyproject.toml setup.py .ci/requirements.txt Makefile model/cpu_pool.c pipeline/cpu_crop.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v cc >/dev/null || \
		{ echo "a C compiler is missing, which pillow-simd and this package are built with: apt-get install build-essential"; exit 1; }
	@echo '#include <Python.h>' | cc -E $$($(PYTHON) -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))') - >/dev/null 2>&1 || \
		{ echo "Python's headers are missing, which pillow-simd is built with: apt-get install python3-dev"; exit 1; }
	@command -v pkg-config >/dev/null || \
		{ echo "pkg-config is missing, with which pillow-simd finds libtiff: apt-get install pkg-config"; exit 1; }
	@missing=; for header in $(PILLOW_HEADERS); do printf '#include <stdio.h>\n#include <%s>\n' $$header | cc -E - >/dev/null 2>&1 || \
		missing="$$missing $$header"; done; test -z "$$missing" || \
		{ echo "headers that pillow-simd is built with are missing:$$missing: apt-get install $(PILLOW_PACKAGES)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint .ci/requirements.txt
	CC="cc $(AVX2)" $(BIN)/pip install --quiet --no-deps --no-cache-dir --force-reinstall --no-binary pillow-simd \
		$(PILLOW_FLAGS) $(PILLOW_SIMD)
	@touch $@
