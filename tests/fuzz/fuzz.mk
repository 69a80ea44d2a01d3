# Builds the fuzz targets, build/fuzz/fuzz_NAME of tests/fuzz/fuzz_NAME.c; called by tests/fuzz.sh.
#
# All of the project goes into one library, compiled once, of which each target links what it calls. Without OpenMP: its
# threads would outlive an input, and two runs of one input might differ.

CLANG = clang
FLAGS = -std=gnu11 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas \
        -fsanitize=address,undefined -fno-sanitize-recover=all
LIBS = -lpcre2-8 -lutf8proc -lcjson -lm

TARGETS := $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))
SOURCES := $(filter-out data/tokenize.c,$(wildcard kernels/*.c model/*.c data/*.c)) # that is a program
OBJECTS := $(SOURCES:%.c=build/fuzz/objects/%.o)

all: $(TARGETS)

# fuzz/input.h says why mmap is wrapped.
build/fuzz/fuzz_%: build/fuzz/objects/tests/fuzz/fuzz_%.o build/fuzz/libmoelab.a
	@$(CLANG) $(FLAGS) -fsanitize=fuzzer -Wl,--wrap=mmap,--wrap=munmap $^ $(LIBS) -o $@

build/fuzz/libmoelab.a: $(OBJECTS)
	@rm -f $@
	@ar rcs $@ $^

# No target computes: kernels are there to be linked, but for the checksum that files carry.
build/fuzz/objects/kernels/%.o: FLAGS += $(if $(filter kernels/checksum,$*),,-O0)

build/fuzz/objects/%.o: %.c tests/fuzz/fuzz.mk
	@mkdir -p $(@D)
	@$(CLANG) $(FLAGS) -fsanitize=fuzzer-no-link $(CPPFLAGS) -MMD -MP -c $< -o $@

.PHONY: all
.SECONDARY:
-include $(wildcard build/fuzz/objects/*/*.d build/fuzz/objects/*/*/*.d)
