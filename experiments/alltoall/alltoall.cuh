/* What every level of the ladder needs and none is about. A level includes this, which includes the rest:
 *
 *     ranks.cuh    processes, MPI and NCCL; what ends them
 *     device.cuh   memory, launches, copies, exchanges: what is counted
 *     packs.cuh    16 bytes of a row
 *     task.cuh     the task of a rank and its inputs; what a level is
 *     check.cuh    what must come out
 *     timing.cuh   the time, one JSON line of result
 *     here         the shapes, and the program: each shape is checked, then timed
 *
 * The task of a rank: its T tokens (T,H) go to K different experts each; of the E experts every rank holds E/ranks
 * neighbours. An expert multiplies a row by a number of its own (at level 8: by a matrix). The result (T,H) is the sum
 * of what the token's experts made of it, weighted:
 *
 *     y[t] = sum over j of weight[t][j] expert[t][j](x[t])
 *
 * A level is a program of its own, which says what it does once for a task and what it does every time:
 *
 *     static void prepare(const Task *task) { .. }      memory, graphs; not timed
 *     static void run(const Task *task) { .. }          from x to y; may wait for the device, which is then in its time
 *     int main(int argc, char **argv) { return alltoall_ladder({"3 persistent", prepare, run}, argc, argv); }
 *
 *     mpirun -n 4 build/alltoall/level_3_persistent [shape ..]      a rank to a GPU; without names all shapes
 *
 * Everything is checked before it is timed: on whole numbers, where every sum is exact in half precision and the bits
 * must be right, and on fractions with weights of both signs. A rank that hears nothing for PATIENCE seconds ends all.
 *
 * Read first: alltoall_ladder at the end, then level_0_host_loops.cu.
 */
#ifndef ALLTOALL_CUH
#define ALLTOALL_CUH

#include "check.cuh"
#include "device.cuh"
#include "packs.cuh"
#include "ranks.cuh"
#include "task.cuh"
#include "timing.cuh"

/* Checks the level on a shape and, if it is one of those to time, times it. Returns whether something was wrong. */
static inline bool try_shape(const Level *level, const Shape *shape, bool timed) {
    int all_wrong = 0;
    for (int whole = 1; whole >= 0; whole--) {
        expect_end_of(level->name, shape->name);
        Task task = make_task(shape, whole, level->multiplies);
        Memory inputs = kept;
        kept.count = 0;
        if (level->prepare) {
            level->prepare(&task);
        }
        int wrong = check_level(level, &task);
        if (wrong > 0 && world.rank == 0) {
            fprintf(stderr, "moelab: alltoall: level %s, shape %s on %d ranks, %s: %d numbers are wrong\n", level->name,
                    shape->name, world.ranks, whole ? "whole numbers" : "fractions", wrong);
        }
        all_wrong += wrong;
        if (timed && !whole && all_wrong == 0) {
            print_line(level, shape, &task);
        }
        CUDA(cudaDeviceSynchronize());
        MPI_Barrier(MPI_COMM_WORLD); /* memory that others store into goes when all are done */
        if (level->release) {
            level->release();
        }
        give_back(&kept);
        give_back(&inputs);
        free((void *)task.host_expert);
    }
    alarm(0);
    return all_wrong > 0;
}

static const Shape checked_shapes[] = {
    {"tiny", 16, 2, 16, 4, EVEN},       {"uneven", 16, 4, 136, 37, UNEVEN},
    {"skewed", 32, 8, 64, 300, SKEWED}, {"several blocks", 32, 5, 72, 700, EVEN},
    {"one token", 16, 1, 16, 1, EVEN},  {"all experts", 16, 16, 24, 20, EVEN},
};

static const Shape timed_shapes[] = {
    {"b1", 8, 2, 6144, 16, EVEN},    {"b2", 64, 6, 2048, 32, EVEN},   {"b3", 128, 4, 2880, 128, EVEN},
    {"b4", 128, 8, 4096, 256, EVEN}, {"b5", 256, 8, 7168, 256, EVEN}, {"t1", 8, 2, 1024, 4096, EVEN},
    {"t2", 64, 8, 2048, 8192, EVEN}, {"t3", 8, 2, 768, 8192, EVEN},
};

static inline bool is_named(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(name, argv[i]) == 0) {
            return true;
        }
    }
    return argc < 2;
}

/* All of a program whose main has nothing but this: for several levels, as for one and the same with other sizes. */
static inline int alltoall_levels(const Level *levels, int count, int argc, char **argv) {
    bool wrong = false;
    world_open(&argc, &argv);
    for (const Level *level = levels; level < levels + count; level++) {
        for (const Shape &shape : checked_shapes) {
            wrong |= try_shape(level, &shape, false);
        }
        for (const Shape &shape : timed_shapes) {
            if (is_named(shape.name, argc, argv)) {
                wrong |= try_shape(level, &shape, true);
            }
        }
    }
    world_close();
    return wrong ? EXIT_ERROR : EXIT_OK;
}

static inline int alltoall_ladder(Level level, int argc, char **argv) {
    return alltoall_levels(&level, 1, argc, argv);
}

#endif
