# moelab: builds the trainer, runs its tests. `make help` prints the menu.
#
# Every source file is found by its folder (train.c, model/, kernels/, data/, tests/test_*): adding one needs no change
# here. Each kind of build is a "variant" with a folder of its own under build/, whose objects mirror the source tree:
#
#     cpu          the program                  build/cpu/kernels/matmul.o -> build/cpu/libmoelab.a -> train
#     double       for gradient checks          build/double/...           real_t is double
#     asan         with sanitizers, for tests   build/asan/...
#     asan-double  both                         build/asan-double/...
#     cuda         the program for GPUs         build/cuda/...             op.cu takes the place of op.c -> train_cuda
#     cuda-fp32    the same in float            build/cuda-fp32/...        for comparisons with the CPU
#
# Variables you may set on the command line, e.g. `make CC=clang OPENMP=0`:
#     CC, ARCH (native), PRECISION (double: ./train in double; fp32: train_cuda in float, not bf16), CUDA_ARCHS,
#     OPENMP, MPI, CUDA, NCCL (0: do without), CPPFLAGS, LDFLAGS,
#     DEMO_OPTIONS, RANKS (of the demo, under mpirun), RECIPE, SWEEP_OUT, SWEEP_OPTIONS (of the sweep),
#     FIGURES_OUT, FIGURES_GRIDS, FIGURES_RUNS, NOTEBOOKS, NOTEBOOKS_OUT, NOTEBOOK_STEPS, TESTS (names of tests to
#     run), SANITIZE (0: leave the sanitized tests out), FUZZ_SECONDS (each), V (1: print commands)

DEMO_DIR = runs/demo
DEMO_OPTIONS = --out $(DEMO_DIR) --batch 8 --steps 900 --lr 4e-3 --min-lr 0.02 --eval-batches 16 --sample 160

ifeq ($(origin CC),default)
CC = gcc
endif
ARCH = native
PRECISION =
CLANG_FORMAT = clang-format
NVCC = $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
HASH := \#
COMMA := ,
Q = $(if $(filter 1,$(V)),,@)

# All cores, unless -j says otherwise. Two goals on one command line ("make clean train") run one after the other.
MAKEFLAGS += --no-print-directory
ifeq ($(MAKELEVEL)$(word 2,$(MAKECMDGOALS)),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif

# ---- flags of each variant

# The compiler's own answer: 201511 where it has OpenMP, nothing where it has not.
ifneq ($(OPENMP),0)
OPENMP_DATE := $(shell printf '$(HASH)include <omp.h>\n_OPENMP\n' | $(CC) -fopenmp -E -P -x c - 2>/dev/null | tail -n 1)
endif

# mpicc says what MPI's header and library need, Open MPI's by one option, MPICH's by another. No MPI_LIBS: no MPI.
ifneq ($(MPI),0)
mpicc_says = $(shell mpicc --showme:$1 2>/dev/null || mpicc -$1_info 2>/dev/null)
MPI_INCLUDES := $(filter -I% -D%,$(call mpicc_says,compile))
MPI_HEADER := $(shell printf '$(HASH)include <mpi.h>\n' | $(CC) $(CPPFLAGS) $(MPI_INCLUDES) -M -x c - 2>/dev/null)
MPI_LIBS := $(if $(MPI_HEADER),$(filter -L% -l% -Wl%,$(call mpicc_says,link)))
endif

# With several GPUs ranks talk through NCCL. No NCCL_HEADER: no NCCL.
ifneq ($(NCCL),0)
NCCL_HEADER := $(firstword $(wildcard $(addsuffix /nccl.h,$(NVCC:bin/nvcc=include) /usr/local/include /usr/include)))
endif

# Not -Ofast or -ffast-math: with those isnan() is always false and a diverged run goes unnoticed.
FLAGS_common = -std=gnu11 -g -Wall -Wextra -Wno-unused-parameter \
               -fno-math-errno -fno-trapping-math -ffp-contract=fast $(if $(ARCH),-march=$(ARCH)) \
               $(if $(OPENMP_DATE),-fopenmp,-Wno-unknown-pragmas) $(if $(MPI_LIBS),-DUSE_MPI $(MPI_INCLUDES))
FLAGS_sanitize = -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

FLAGS_cpu = $(FLAGS_common) -O3
FLAGS_double = $(FLAGS_cpu) -DREAL_DOUBLE
FLAGS_asan = $(FLAGS_common) $(FLAGS_sanitize)
FLAGS_asan-double = $(FLAGS_asan) -DREAL_DOUBLE
FLAGS_cuda = $(FLAGS_cpu) -DREAL_BF16
FLAGS_cuda-fp32 = $(FLAGS_cpu)
# Tests are compiled for the compiler's time: what takes their own is in the library. Of that the sanitized builds spend
# most in the kernels.
FLAGS_tests = -O0 -Wno-format-truncation
FLAGS_sanitized_kernels = -O2
# sm_80 is Ampere, with PTX for cards after Hopper; compute_90a (Hopper) cannot be had from the -arch=sm_90a shorthand
# when code uses wgmma.
CUDA_ARCHS = "-gencode=arch=compute_80,code=[sm_80,compute_80]" -gencode=arch=compute_90a,code=sm_90a
CUDA_WARNINGS = -Xcompiler -Wall,-Wextra,-Wno-unused-parameter,-Wno-missing-field-initializers -Werror all-warnings
FLAGS_nvcc = -O3 -std=c++17 -lineinfo $(CUDA_WARNINGS) $(CUDA_ARCHS) $(if $(NCCL_HEADER),-DUSE_NCCL)
FLAGS_nvcc-cuda = $(FLAGS_nvcc) -DREAL_BF16
FLAGS_nvcc-cuda-fp32 = $(FLAGS_nvcc)

LIBS = -lcjson -lpcre2-8 -lutf8proc $(MPI_LIBS) -lm

VARIANT := $(or $(if $(filter double,$(PRECISION)),double),$(if $(filter-out fp32,$(PRECISION)),\
             $(error PRECISION=$(PRECISION): choose fp32, double or nothing)),cpu)
CUDA_VARIANT = cuda$(if $(filter fp32,$(PRECISION)),-fp32)

# ---- sources

PROGRAMS = train data/tokenize
SOURCES := $(filter-out $(PROGRAMS:=.c),$(wildcard kernels/*.c model/*.c data/*.c))
CUDA_SOURCES := $(wildcard kernels/*.cu)
WITHOUT_CUDA := $(filter-out $(CUDA_SOURCES:.cu=.c),$(SOURCES))

# $1 variant, $2 C source: the variant whose object serves. data/ knows no real_t (tests/check_tree.sh holds it and what
# it includes to that), and the host's code of train_cuda in float is that of the CPU's program.
object_from = $(if $(filter data/%,$2),$(if $(filter asan%,$1),asan,cpu),$(if $(filter cuda-fp32,$1),cpu,$1))

# $1 variant
objects_of = $(if $(filter cuda%,$1),$(CUDA_SOURCES:%.cu=build/$1/%.o)) \
             $(foreach source,$(if $(filter cuda%,$1),$(WITHOUT_CUDA),$(SOURCES)),\
             build/$(call object_from,$1,$(source))/$(source:.c=.o))

# ---- what a bare `make` does

.PHONY: all help detect train_cuda_if_any
all: $(PROGRAMS) train_cuda_if_any
	@$(MAKE) help
	@$(MAKE) detect

help:
	@echo "make           build ./train and data/tokenize and print this menu"
	@echo "make demo      train a small model for about a minute; the report is $(DEMO_DIR)/report.html"
	@echo "make sweep     train three routers at two sizes with three seeds each, in some minutes, and compare them"
	@echo "make test      check, build and run every test, sanitizers included"
	@echo "make fuzz      $(FUZZ_SECONDS) s of made-up input for each reader of files (FUZZ_SECONDS)"
	@echo "make check     include direction, headers that compile alone, formatting (seconds)"
	@echo "make ladder    build the rungs of experiments/ladder, kernels from the simplest to the fastest (needs nvcc)"
	@echo "make alltoall  build the levels of experiments/alltoall, the exchange between GPUs (needs nvcc, MPI, NCCL)"
	@echo "make bench     measure the speed of the kernels and of training on this machine"
	@echo "make grids     measure MoE layers stage by stage over grids of sizes, routers and layouts (minutes)"
	@echo "make figures   draw figures A to D and a report of all kept lines, into $(FIGURES_OUT) (python3 alone)"
	@echo "make notebooks execute notebooks/*.ipynb into place (installs Jupyter, NumPy, Matplotlib; minutes)"
	@echo "make setup     install the packages that are missing (apt-get); demo and test do it by themselves"
	@echo "make format    apply .clang-format"
	@echo "make clean     remove what was built; runs/ stays"
	@echo "./train --help lists the options of the program, data/tokenize --help says how to make tokens of text"

# One line per feature: what was found, what it is for, how to do without.
detect:
	@echo
	@echo "OpenMP  $(call found,$(OPENMP_VERSION),$(OPENMP)); one process uses all cores (OPENMP=0: one core)"
	@echo "MPI     $(call found,$(MPI_VERSION),$(MPI)); ./train runs on several ranks (MPI=0: do without)"
	@echo "CUDA    $(call found,$(CUDA_VERSION),$(CUDA)); $(CUDA_USE) (CUDA=0: do without)"
	@echo "NCCL    $(call found,$(NCCL_VERSION),$(NCCL)); train_cuda runs on several GPUs (NCCL=0: on one)"

# $1 version, $2 override
found = $(if $(filter 0,$2),off,$(if $1,found $1,not found))

OPENMP_VERSION = $(patsubst 201511,4.5,$(patsubst 201811,5.0,$(patsubst 202011,5.1,$(OPENMP_DATE))))
MPIRUN_VERSION = $(shell mpirun --version 2>/dev/null | grep -o -m 1 '[0-9][0-9.]*')
MPI_VERSION = $(if $(MPI_LIBS),$(or $(MPIRUN_VERSION),without mpirun))
CUDA_VERSION = $(if $(NVCC),$(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'))
CUDA_USE = $(if $(CUDA_SOURCES),train_cuda runs on GPUs,no CUDA kernels in this version)
NCCL_NUMBER = sed -n 's/.define NCCL_\(MAJOR\|MINOR\|PATCH\) //p' $(NCCL_HEADER) | paste -sd.
NCCL_VERSION = $(if $(NCCL_HEADER),$(shell $(NCCL_NUMBER)))

# ---- what must be installed: header:package, program:package

BUILD_NEEDS = stdio.h:libc6-dev cjson/cJSON.h:libcjson-dev stb/stb_ds.h:libstb-dev pcre2.h:libpcre2-dev \
              utf8proc.h:libutf8proc-dev
MPI_NEEDS = $(if $(filter 0,$(MPI)),,mpi.h:libopenmpi-dev mpirun:openmpi-bin)
TEST_NEEDS = $(BUILD_NEEDS) cmocka.h:libcmocka-dev python3:python3 curl:curl $(MPI_NEEDS)
FUZZ_NEEDS = $(BUILD_NEEDS) clang:clang libfuzzer:libclang-rt-dev
NOTEBOOK_NEEDS = $(BUILD_NEEDS) $(MPI_NEEDS) numpy.py:python3-numpy matplotlib.py:python3-matplotlib \
                 nbconvert.py:jupyter-nbconvert ipykernel.py:python3-ipykernel

# Packages to install so that the headers in $1 can be included, its programs run and its modules (.py) imported by the
# python3 of PATH or the distribution's; empty when all is there.
missing = $(strip $(shell command -v $(CC) >/dev/null || echo gcc; for need in $1; do \
    case $$need in \
    (*.h:*) echo "$(HASH)include <$${need%:*}>" | \
        $(CC) $(CPPFLAGS) $(MPI_INCLUDES) -DPCRE2_CODE_UNIT_WIDTH=8 -E -x c - ;; \
    (libfuzzer:*) echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | \
        clang -fsanitize=fuzzer,address -x c - -o /dev/null ;; \
    (*.py:*) python3 -c "import $${need%.py:*}" || /usr/bin/python3 -c "import $${need%.py:*}" ;; \
    (*) command -v $${need%:*} ;; \
    esac >/dev/null 2>&1 || echo $${need$(HASH)*:}; done))

.PHONY: setup setup-sweep setup-tests setup-fuzz setup-notebooks toolchain
setup: NEEDS = $(BUILD_NEEDS) $(if $(RANKS),$(MPI_NEEDS))
setup-sweep: NEEDS = $(BUILD_NEEDS) python3:python3
setup-tests: NEEDS = $(TEST_NEEDS)
setup-fuzz: NEEDS = $(FUZZ_NEEDS)
setup-notebooks: NEEDS = $(NOTEBOOK_NEEDS)
setup setup-sweep setup-tests setup-fuzz setup-notebooks:
	@missing="$(call missing,$(NEEDS))"; \
	[ -n "$$missing" ] || exit 0; \
	if ! command -v apt-get >/dev/null; then \
	    echo "moelab needs gcc, the C library's headers, cJSON, stb, PCRE2, utf8proc and, for make test, cmocka," \
	         "Python, curl and Open MPI, for make notebooks NumPy, Matplotlib, nbconvert and ipykernel: install them" \
	         "with your package manager (missing, by Debian's names: $$missing)" >&2; exit 1; \
	fi; \
	install="apt-get install -y --no-install-recommends $$missing"; \
	if [ "$$(id -u)" = 0 ]; then sudo=env; \
	elif sudo -n true 2>/dev/null || { command -v sudo && true </dev/tty; } >/dev/null 2>&1; then sudo="sudo env"; \
	else echo "moelab: no right to install packages here; have this run: sudo $$install" >&2; exit 1; \
	fi; \
	echo "setup: installing $$missing with apt-get"; \
	log=$$(mktemp); apt="$$sudo DEBIAN_FRONTEND=noninteractive"; \
	if $$apt $$install </dev/null >$$log 2>&1 || \
	   { $$apt apt-get update </dev/null >>$$log 2>&1; $$apt $$install </dev/null >>$$log 2>&1; }; then rm -f $$log; \
	else tail -n 20 $$log >&2; rm -f $$log; echo "moelab: could not install; try: sudo $$install" >&2; exit 1; \
	fi

# Runs before the first object is compiled, so that what is missing is named by its package, not by a failed #include.
toolchain:
	@missing="$(call missing,$(BUILD_NEEDS))"; [ -z "$$missing" ] || { \
	    echo "moelab: run make setup (or: sudo apt-get install $$missing)" >&2; exit 1; }
	@[ '$(MPI)' != 1 ] || [ '$(MPI_LIBS)' ] || { \
	    echo "moelab: no MPI is found: sudo apt-get install libopenmpi-dev openmpi-bin, or leave MPI=1 out" >&2; \
	    exit 1; }

# ---- compiling and linking

# Files that are written only when their content changes, so that what depends on them is rebuilt then and only then.
# $1 the file, $2 a command that prints its content
.PHONY: FORCE
write_if_changed = mkdir -p $(dir $1) && { $2; } >$1.$$$$ && { cmp -s $1.$$$$ $1 && rm $1.$$$$ || mv $1.$$$$ $1; }

# Compiler and flags: another CC or ARCH rebuilds everything.
build/%/flags: FORCE
	@$(call write_if_changed,$@,echo '$(CC) $(FLAGS_$*) $(FLAGS_tests) $(CPPFLAGS) \
	    $(if $(filter cuda%,$*),$(NVCC) $(FLAGS_nvcc-$*))')

# The commit that logs and results name, as compiler arguments (read with @file by model/commit.c alone).
GIT_SHA = $(if $(wildcard .git),$(shell git rev-parse --short=12 --verify --quiet HEAD 2>/dev/null))
GIT_SOURCES = Makefile train.c model kernels data 'experiments/*.c' 'experiments/*.cu' 'experiments/*.cuh'
GIT_CHANGES = $(if $(GIT_SHA),$(shell git status --porcelain -- $(GIT_SOURCES) 2>/dev/null))
GIT_DIRTY = $(if $(GIT_SHA),$(if $(GIT_CHANGES),1,0),unknown)
GIT_MACROS = -DMOELAB_GIT_SHA=\"$(or $(GIT_SHA),unknown)\" -DMOELAB_GIT_DIRTY=\"$(GIT_DIRTY)\"
build/git: FORCE
	@$(call write_if_changed,$@,echo '$(GIT_MACROS)')

# $1 variant, $2 folder of its test programs. A line "// link: FLAGS" in a test adds flags to its link.
flags_of = $(FLAGS_$1) $(if $(filter tests/test_%,$2),$(FLAGS_tests)) \
           $(if $(and $(filter asan%,$1),$(filter kernels/%,$2)),$(FLAGS_sanitized_kernels))
define VARIANT_RULES
build/$1/%.o: %.c build/$1/flags | toolchain
	@mkdir -p $$(@D)
	@echo "CC  $$@"
	$(Q)$$(CC) $$(call flags_of,$1,$$<) $$(CPPFLAGS) $$(VERSION) -MMD -MP -c $$< -o $$@

build/$1/model/commit.o: VERSION = @build/git
build/$1/model/commit.o: build/git
build/$1/model/report.o: $(wildcard model/report.html)

build/$1/libmoelab.a: $$(call objects_of,$1)
	@rm -f $$@
	$(Q)ar rcs $$@ $$^

build/$2/%: build/$1/tests/%.o build/$1/libmoelab.a
	@mkdir -p $$(@D)
	$(Q)$$(CC) $$(FLAGS_$1) $$< build/$1/libmoelab.a \
	    $$$$(sed -n 's,^// link: ,,p' tests/$$*.c) $$(LDFLAGS) -lcmocka $$(LIBS) -o $$@
endef
$(eval $(call VARIANT_RULES,cpu,test))
$(eval $(call VARIANT_RULES,double,test-double))
$(eval $(call VARIANT_RULES,asan,test-asan))
$(eval $(call VARIANT_RULES,asan-double,test-asan-double))

$(PROGRAMS): %: build/$(VARIANT)/%.o build/$(VARIANT)/libmoelab.a build/train.variant
	@echo "LD  $@"
	$(Q)$(CC) $(FLAGS_$(VARIANT)) $(filter %.o %.a,$^) $(LDFLAGS) $(LIBS) -o $@

build/train.variant: FORCE
	@$(call write_if_changed,$@,echo $(VARIANT))

# Compiled objects are kept, though no rule names them; -MMD wrote down which headers each one includes.
.SECONDARY:
-include $(wildcard build/*/*.d build/*/*/*.d)

# ---- CUDA: the same train.c, model/ and data/; where kernels/ has op.cu it is linked instead of op.c

CUDA_PROGRAM = $(if $(and $(CUDA_SOURCES),$(NVCC)),train_cuda,no_cuda)

# Built by a bare `make` where it can be; where it cannot, only who asked for it with CUDA=1 is told.
train_cuda_if_any: $(if $(filter 0,$(CUDA)),,$(if $(CUDA),$(CUDA_PROGRAM),$(filter train_cuda,$(CUDA_PROGRAM))))

.PHONY: no_cuda
no_cuda:
	@echo "moelab: $(if $(CUDA_SOURCES),$(NO_NVCC),$(NO_CUDA_PROGRAM))" >&2; exit 1
NO_NVCC = nvcc is not found: install the CUDA Toolkit, or name it with NVCC=/path/to/nvcc
NO_CUDA_PROGRAM = this version has no CUDA program; without CUDA=1 the CPU is used

ifeq ($(CUDA_PROGRAM),train_cuda)
define CUDA_RULES
build/$1/%.o: %.cu build/$1/flags
	@mkdir -p $$(@D)
	@echo "NVCC $$@"
	$(Q)$$(NVCC) $$(FLAGS_nvcc-$1) $$(CPPFLAGS) -MMD -MP -c $$< -o $$@
endef
# The rule for op.cu comes first: make takes it before the one for op.c.
$(foreach variant,cuda cuda-fp32,$(eval $(call CUDA_RULES,$(variant))) \
    $(eval $(call VARIANT_RULES,$(variant),test-$(variant))))

# nvcc links: it knows where its own libraries are, but has words of its own for the linker's options.
LINK_CUDA = $(NVCC) $(CUDA_ARCHS) $(if $(OPENMP_DATE),-Xcompiler -fopenmp) $(filter %.o %.a,$^) $(LDFLAGS) -lcublas \
            $(if $(NCCL_HEADER),-lnccl) $(patsubst -Wl$(COMMA)%,-Xlinker %,$(LIBS))

train_cuda: build/$(CUDA_VARIANT)/train.o build/$(CUDA_VARIANT)/libmoelab.a build/train_cuda.variant
	@echo "LD  $@"
	$(Q)$(LINK_CUDA) -o $@

build/train_cuda_fp32: build/cuda-fp32/train.o build/cuda-fp32/libmoelab.a
	$(Q)$(LINK_CUDA) -o $@

build/train_cuda.variant: FORCE
	@$(call write_if_changed,$@,echo $(CUDA_VARIANT))
else
train_cuda: no_cuda
endif

# ---- demo, tests, benchmark

# With RANKS=4 the demo runs on four ranks, which hold the experts between them and share what cores there are.
MPIRUN = $(if $(RANKS),mpirun -n $(RANKS) --oversubscribe --bind-to none --quiet $(if $(filter 0,$(shell id -u)),\
         --allow-run-as-root) )

# Each step is a make of its own: after setup has installed a compiler, the next make finds it.
.PHONY: demo sweep test check fuzz bench grids format clean
DEMO_PROGRAM = $(if $(filter-out 0,$(CUDA)),$(CUDA_PROGRAM),train)
demo: $(filter no_cuda,$(DEMO_PROGRAM))
	@$(MAKE) setup
	@$(MAKE) $(DEMO_PROGRAM)
	$(MPIRUN)./$(DEMO_PROGRAM) $(if $(RANKS),--ep $(RANKS) )$(DEMO_OPTIONS)
	@echo "report: $(DEMO_DIR)/report.html (open it in a browser)"

# A sweep goes on where the same command was interrupted; its table comes from what is finished. Runs of a CPU take one
# core each; with CUDA=1 there is one on each GPU.
RECIPE = experiments/recipes/demo.sweep
SWEEP_OUT = runs/sweep
SWEEP_OPTIONS = $(if $(filter-out 0,$(CUDA)),--gpus all,--jobs $(shell nproc 2>/dev/null || echo 2) --threads 1)
sweep: $(filter no_cuda,$(DEMO_PROGRAM))
	@$(MAKE) setup-sweep
	@$(MAKE) $(DEMO_PROGRAM)
	@experiments/sweep $(RECIPE) --out $(SWEEP_OUT) --program ./$(DEMO_PROGRAM) $(SWEEP_OPTIONS)
	@experiments/sweep rank $(SWEEP_OUT) >$(SWEEP_OUT)/table.md
	@[ ! -x experiments/report ] || experiments/report $(SWEEP_OUT) -o $(SWEEP_OUT)/report.html
	@for page in table.md report.html; do [ ! -f $(SWEEP_OUT)/$$page ] || echo "$$page: $(SWEEP_OUT)/$$page"; done

# A test with a line "// build: double" is for the double build alone, one with "// build: both" is built twice.
# One with "// sanitize: no" says which test runs the same code sanitized.
TEST_SOURCES := $(wildcard tests/test_*.c)
IN_DOUBLE := $(shell grep -lE '^// build: (double|both)' $(TEST_SOURCES) /dev/null)
NOT_IN_FLOAT := $(shell grep -lE '^// build: double' $(TEST_SOURCES) /dev/null)
UNSANITIZED := $(shell grep -lE '^// sanitize: no' $(TEST_SOURCES) /dev/null)
TESTS = $(patsubst tests/%,%,$(TEST_SOURCES:.c=) $(wildcard tests/test_*.sh))
SANITIZE = 1

chosen_tests = $(filter $(TESTS),$(patsubst tests/%.c,%,$1))
FLOAT_TESTS = $(call chosen_tests,$(filter-out $(NOT_IN_FLOAT),$(TEST_SOURCES)))
DOUBLE_TESTS = $(call chosen_tests,$(IN_DOUBLE))
TEST_PROGRAMS = $(FLOAT_TESTS:%=build/test/%) $(DOUBLE_TESTS:%=build/test-double/%)
ifneq ($(SANITIZE),0)
SANITIZED = $(filter-out $(call chosen_tests,$(UNSANITIZED)),$(FLOAT_TESTS))
TEST_PROGRAMS += $(SANITIZED:%=build/test-asan/%) $(filter-out $(FLOAT_TESTS:%=build/test-asan-double/%),\
                 $(DOUBLE_TESTS:%=build/test-asan-double/%))
endif
TEST_SCRIPTS = $(addprefix tests/,$(filter %.sh,$(TESTS)))
PROGRAMS_OF_SCRIPTS = $(if $(filter test_comm.sh,$(TESTS)),build/comm_ranks) \
                      $(if $(filter test_exchange%.sh,$(TESTS)),build/exchange_ranks build/exchange_ranks_double \
                      $(if $(filter 0,$(SANITIZE)),,build/exchange_ranks_asan)) \
                      $(if $(filter test_bench_alltoall.sh,$(TESTS)),build/bench_alltoall) \
                      $(if $(filter test_specialise.sh,$(TESTS)),build/specialise_toy) \
                      $(if $(filter test_bench_layer.sh,$(TESTS)),build/bench_layer) \
                      $(if $(filter test_bench_generate.sh,$(TESTS)),build/bench_generate)

# With CUDA=1 also the programs for a GPU, and what compares them with the CPU; without a GPU they are built, not run.
CUDA_TESTS = $(if $(filter 1,$(CUDA)),$(if $(filter train_cuda,$(CUDA_PROGRAM)),train_cuda build/train_cuda_fp32 \
             build/parity_cpu build/parity_cuda build/parity_cuda_fp32 build/comm_ranks_cuda build/bench_layer_cuda \
             build/bench_train_cuda build/bench_generate_cuda build/bench_alltoall_cuda))

# Where something does not compile, -k goes on and run_tests.sh counts what is missing as failed.
test: $(if $(filter 1,$(CUDA)),$(filter no_cuda,$(CUDA_PROGRAM)))
	@$(MAKE) setup-tests
	@build=; $(MAKE) -k $(PROGRAMS) $(TEST_PROGRAMS) $(PROGRAMS_OF_SCRIPTS) $(CUDA_TESTS) || build=failed; \
	    BUILD=$$build CC='$(CC)' CLANG_FORMAT='$(CLANG_FORMAT)' \
	    tests/run_tests.sh tests/check_tree.sh $(PROGRAMS) $(CUDA_TESTS) $(TEST_SCRIPTS) $(TEST_PROGRAMS) \
	        $(if $(CUDA_TESTS),$(if $(wildcard /dev/nvidia0),tests/cuda.sh))

check:
	@CC='$(CC)' CLANG_FORMAT='$(CLANG_FORMAT)' tests/check_tree.sh

# Every reader of files against made-up input, FUZZ_SECONDS each; needs clang with libFuzzer.
FUZZ_SECONDS = 60
fuzz:
	@$(MAKE) setup-fuzz
	@tests/fuzz.sh $(FUZZ_SECONDS)

# NOTEBOOKS: only those whose names contain one of these; NOTEBOOKS_OUT: a folder for the executed copies, so that the
# notebooks stay as they are; NOTEBOOK_STEPS: the most training steps of a run.
NOTEBOOKS =
NOTEBOOKS_OUT =
.PHONY: notebooks
notebooks:
	@$(MAKE) setup-notebooks
	@$(MAKE) train build/bench_train build/bench_layer
	@$(if $(NOTEBOOK_STEPS),NOTEBOOK_STEPS=$(NOTEBOOK_STEPS) )notebooks/execute.sh \
	    $(if $(NOTEBOOKS_OUT),-o $(NOTEBOOKS_OUT)) $(NOTEBOOKS)

bench: build/bench_train
	@build/bench_train $(BENCH_OPTIONS)

# All grids of microbenchmarks, with CUDA=1 those of a GPU, else their small twins; lines are added to GRIDS_OUT.
GRIDS_OUT = runs/grids.jsonl
GRIDS_OPTIONS = $(if $(filter 1,$(CUDA)),,--scale small --seconds 0.1)
GRIDS_PROGRAM = build/bench_layer$(if $(filter 1,$(CUDA)),_cuda)
grids: $(GRIDS_PROGRAM)
	@mkdir -p $(dir $(GRIDS_OUT))
	@experiments/grids.sh -o '$(GRIDS_OPTIONS)' $(GRIDS_PROGRAM) $(GRIDS_OUT)

# Figures from kept lines: figure_a to figure_d as a page and as SVG (D one for each comparison), and report.html of all
# of them, its drawings in all/. FIGURES_GRIDS and FIGURES_RUNS: files or folders to draw instead.
FIGURES_OUT = runs/figures
FIGURES_GRIDS = experiments/results/grids.jsonl
FIGURES_RUNS = experiments/results/r4_capacity.jsonl experiments/results/r2_balance.jsonl
FIGURES_ALL = $(wildcard experiments/results/*.jsonl)
FIGURES = figure-a figure-b figure-c figure-d
.PHONY: figures $(FIGURES)
figure-a: FIGURE_TITLE = A. Gate, top-k and plan
figure-b: FIGURE_TITLE = B. Bandwidth of pack and combine
figure-c: FIGURE_TITLE = C. Stages of a layer
figure-d: FIGURE_TITLE = D. Load and overflow beside quality and speed
figure-a figure-b figure-c: FIGURE_LINES = $(FIGURES_GRIDS)
figure-d: FIGURE_LINES = $(FIGURES_RUNS)
$(FIGURES): figure-%:
	@mkdir -p $(FIGURES_OUT)
	@experiments/report $(FIGURE_LINES) -o $(FIGURES_OUT)/figure_$*.html --only figure_$* --figures $(FIGURES_OUT) \
	    --title '$(FIGURE_TITLE)'

figures: $(FIGURES)
	@experiments/report $(FIGURES_ALL) -o $(FIGURES_OUT)/report.html --figures $(FIGURES_OUT)/all \
	    --title 'All kept results'

# Programs of the tests and experiments that are built on demand: build/NAME, and build/NAME_cuda for a GPU.
build/bench_train: build/cpu/experiments/bench_train.o
BENCH_LAYER = $(addprefix experiments/,bench_layer.o bench_grid.o bench_grid_line.o bench_moe.o \
                bench_moves.o bench_provenance.o bench_times.o)
BENCH_GENERATE = $(addprefix experiments/,bench_generate.o bench_provenance.o bench_times.o)
build/bench_generate: $(addprefix build/cpu/,$(BENCH_GENERATE))
build/bench_layer: $(addprefix build/cpu/,$(BENCH_LAYER))
build/bench_alltoall: build/cpu/experiments/bench_alltoall.o build/cpu/experiments/scale_rows.o
build/specialise_toy: build/cpu/experiments/specialise_toy.o
build/hf_logits: build/cpu/tests/hf_logits.o
build/comm_ranks: build/cpu/tests/comm_ranks.o
build/exchange_ranks: build/cpu/tests/exchange_ranks.o
$(addprefix build/,bench_train bench_layer bench_generate bench_alltoall specialise_toy hf_logits comm_ranks \
    exchange_ranks): build/cpu/libmoelab.a
	$(Q)$(CC) $(FLAGS_cpu) $(filter %.o,$^) $(filter %.a,$^) $(LDFLAGS) $(LIBS) -o $@

build/exchange_ranks_%: build/%/tests/exchange_ranks.o build/%/libmoelab.a
	$(Q)$(CC) $(FLAGS_$*) $^ $(LDFLAGS) $(LIBS) -o $@

build/parity_cpu: build/cpu/tests/parity.o build/cpu/libmoelab.a
	$(Q)$(CC) $(FLAGS_cpu) $(filter %.o,$^) $(filter %.a,$^) $(LDFLAGS) $(LIBS) -o $@

$(foreach name,tests/parity tests/hf_logits tests/comm_ranks experiments/bench_train experiments/bench_layer \
    experiments/bench_generate experiments/bench_alltoall,\
    $(eval build/$(notdir $(name))_cuda: build/cuda/$(name).o build/cuda/libmoelab.a))
build/bench_alltoall_cuda: build/cuda/experiments/scale_rows.o
build/bench_layer_cuda: $(addprefix build/cuda/,$(BENCH_LAYER))
build/bench_generate_cuda: $(addprefix build/cuda/,$(BENCH_GENERATE))
build/parity_cuda_fp32: build/cuda-fp32/tests/parity.o build/cuda-fp32/libmoelab.a
$(addprefix build/,parity_cuda parity_cuda_fp32 bench_train_cuda bench_layer_cuda bench_generate_cuda \
    bench_alltoall_cuda hf_logits_cuda comm_ranks_cuda):
	$(Q)$(LINK_CUDA) -o $@

# The rungs of experiments/ladder, each one file: build/ladder/LADDER_level_N_NAME. experiments/ladder/run.sh runs them.
LADDER = $(foreach source,$(wildcard experiments/ladder/*/level_*.cu),\
         build/ladder/$(notdir $(patsubst %/,%,$(dir $(source))))_$(basename $(notdir $(source))))
.PHONY: ladder
ladder: $(LADDER)
define LADDER_RULE
build/ladder/$(notdir $1)_%.o: $1/%.cu experiments/ladder/ladder.cuh
	@mkdir -p $$(@D)
	@echo "NVCC $$@"
	$(Q)$$(NVCC) -O3 -std=c++17 $$(CUDA_WARNINGS) $$(CUDA_ARCHS) -c $$< -o $$@
endef
$(foreach folder,$(patsubst %/,%,$(wildcard experiments/ladder/*/)),$(eval $(call LADDER_RULE,$(folder))))
$(LADDER): %: %.o build/cpu/model/commit.o
	$(Q)$(NVCC) $(CUDA_ARCHS) $^ -lcublas -o $@

# The levels of experiments/alltoall, each one file: build/alltoall/level_N_NAME. experiments/alltoall/run.sh runs them.
ALLTOALL = $(patsubst experiments/%.cu,build/%,$(wildcard experiments/alltoall/level_*.cu))
ALLTOALL_LACKS = $(strip $(if $(NVCC),,nvcc) $(if $(MPI_LIBS),,MPI) $(if $(NCCL_HEADER),,nccl.h))
.PHONY: alltoall
alltoall: $(if $(ALLTOALL_LACKS),no_alltoall,$(ALLTOALL))
.PHONY: no_alltoall
no_alltoall:
	@echo "moelab: the levels of experiments/alltoall need nvcc, MPI and NCCL; not found: $(ALLTOALL_LACKS)" >&2; exit 1
build/alltoall/%.o: experiments/alltoall/%.cu $(wildcard experiments/alltoall/*.cuh)
	@mkdir -p $(@D)
	@echo "NVCC $@"
	$(Q)$(NVCC) -O3 -std=c++17 $(CUDA_WARNINGS) $(CUDA_ARCHS) $(MPI_INCLUDES) -c $< -o $@
$(ALLTOALL): %: %.o build/cpu/kernels/check.o build/cpu/model/commit.o
	$(Q)$(NVCC) $(CUDA_ARCHS) $^ -lnccl -lcublas $(patsubst -Wl$(COMMA)%,-Xlinker %,$(MPI_LIBS)) -o $@

format:
	find train.c model kernels data tests experiments -regex '.*\.\(c\|h\|cu\|cuh\)' -exec $(CLANG_FORMAT) -i {} +

clean:
	rm -rf build $(PROGRAMS) train_cuda
