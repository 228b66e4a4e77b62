/* Sums over samples of the absolute values, or the squares, of matrix products:
 *
 *   total[o, p] += sum_n f(sum_l delta[n, o, l] patch[n, l, p])
 *   patch[n, l, p] = input[n sample_stride + positions[l] + columns[p]]
 *
 * f is the absolute value or the square. A tile of a sample's product is computed in registers and f of it is added to
 * the sum of the tile, so that the product is never written to memory. With calls of a matrix library, the product of
 * every sample, which is as large as the weights, would be written to memory and read again.
 *
 * The code is C for GCC and Clang and includes no header of Python or PyTorch. It is compiled with OpenMP but not linked to
 * it: the functions of OpenMP are those of the library that PyTorch has loaded, so that both share one thread pool.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 8                 /* outputs in a tile */
#define PACKED_BYTES (1 << 18) /* of the packed patches of a block of samples, which must fit the L2 cache of a core */

const int rows = ROWS; /* the caller packs delta in groups of this many outputs */

typedef struct {
    const float *delta; /* [ceil(O / ROWS), N, L, ROWS], zeros beyond O */
    const float *input;
    const int64_t *positions, *columns;
    float *totals; /* [num_parts, O, P], one for each part of the samples; parts are computed in parallel */
    int64_t num_samples, num_outputs, num_positions, num_columns, sample_stride, num_parts;
    int exponent, num_threads;
} Task;

typedef void Tile(const Task *, int64_t column, int64_t first, int64_t last, float *packed, float *total);

/* Defines a Tile, which handles two vectors of patch entries from `column` on, all outputs, and the samples in
 * [first, last). */
#define DEFINE_TILE(NAME, TARGET, WIDTH)                                                                             \
    typedef float NAME##_floats __attribute__((vector_size(4 * WIDTH), may_alias));                                  \
    typedef int32_t NAME##_bits __attribute__((vector_size(4 * WIDTH)));                                             \
    TARGET static void NAME(const Task *task, int64_t column, int64_t first, int64_t last, float *packed,            \
                            float *total) {                                                                          \
        const int64_t num_positions = task->num_positions, *columns = task->columns + column;                        \
        const int64_t left = task->num_columns - column, filled = left < 2 * WIDTH ? left : 2 * WIDTH;               \
        const int contiguous = filled == 2 * WIDTH && columns[2 * WIDTH - 1] - columns[0] == 2 * WIDTH - 1;          \
        float *into = packed;                                                                                        \
        for (int64_t n = first; n < last; n++)                                                                       \
            for (int64_t l = 0; l < num_positions; l++, into += 2 * WIDTH) {                                         \
                const float *from = task->input + n * task->sample_stride + task->positions[l];                      \
                if (contiguous)                                                                                      \
                    memcpy(into, from + columns[0], sizeof(float) * 2 * WIDTH);                                      \
                else                                                                                                 \
                    for (int64_t p = 0; p < 2 * WIDTH; p++) into[p] = p < filled ? from[columns[p]] : 0;             \
            }                                                                                                        \
        for (int64_t o = 0; o < task->num_outputs; o += ROWS) {                                                      \
            NAME##_floats sums[ROWS][2] = {0};                                                                       \
            const float *delta = task->delta + (o * task->num_samples + first * ROWS) * num_positions;               \
            const NAME##_floats *patch = (const NAME##_floats *)packed;                                              \
            for (int64_t n = first; n < last; n++) {                                                                 \
                NAME##_floats product[ROWS][2] = {0};                                                                \
                for (int64_t l = 0; l < num_positions; l++, delta += ROWS, patch += 2)                               \
                    for (int r = 0; r < ROWS; r++)                                                                   \
                        for (int half = 0; half < 2; half++) product[r][half] += delta[r] * patch[half];             \
                for (int r = 0; r < ROWS; r++)                                                                       \
                    for (int half = 0; half < 2; half++)                                                             \
                        if (task->exponent == 1)                                                                     \
                            sums[r][half] += (NAME##_floats)((NAME##_bits)product[r][half] & INT32_MAX);             \
                        else                                                                                         \
                            sums[r][half] += product[r][half] * product[r][half];                                    \
            }                                                                                                        \
            for (int r = 0; r < ROWS && o + r < task->num_outputs; r++) {                                            \
                float *to = total + (o + r) * task->num_columns + column, sum[2 * WIDTH];                            \
                memcpy(sum, sums[r], sizeof sum);                                                                    \
                for (int64_t p = 0; p < filled; p++) to[p] += sum[p];                                                \
            }                                                                                                        \
        }                                                                                                            \
    }

#ifdef __x86_64__
DEFINE_TILE(tile_16, __attribute__((target("avx512f"))), 16)
DEFINE_TILE(tile_8, __attribute__((target("avx2,fma"))), 8)
#endif
DEFINE_TILE(tile_4, , 4)

/* The number of floats in a vector register of this processor. */
int vector_width(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

/* Adds to the totals of the task, in an order that does not depend on the number of threads. Returns 0, or 1 if memory could
 * not be allocated. `vector` is `vector_width()` or one of the smaller widths. */
int add_absolute_products(const Task *task, int vector) {
    Tile *tile = tile_4;
#ifdef __x86_64__
    if (vector == 16) tile = tile_16;
    if (vector == 8) tile = tile_8;
#endif
    const int64_t width = 2 * vector, sample_bytes = (int64_t)sizeof(float) * width * task->num_positions;
    const int64_t num_tiles = (task->num_columns + width - 1) / width;
    const int64_t block = sample_bytes < PACKED_BYTES ? PACKED_BYTES / sample_bytes : 1;
    int failed = 0;
#pragma omp parallel num_threads(task->num_threads) reduction(| : failed)
    {
        void *packed = NULL;
        failed = posix_memalign(&packed, 64, (size_t)(block * sample_bytes)) != 0;
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < num_tiles * task->num_parts; work++) {
            const int64_t column = work / task->num_parts * width, part = work % task->num_parts;
            const int64_t end = task->num_samples * (part + 1) / task->num_parts;
            float *total = task->totals + part * task->num_outputs * task->num_columns;
            for (int64_t first = task->num_samples * part / task->num_parts; first < end && !failed; first += block)
                tile(task, column, first, first + block < end ? first + block : end, packed, total);
        }
        free(packed);
    }
    return failed;
}
