/* Few rows times a matrix that was laid out beforehand: x weight' + bias, for processors with 512-bit vectors.

   A panel is COLUMNS outputs of the matrix with all their inputs, in the order in which they are read. bfloat16 goes by
   pairs of inputs, as the processor's dot product takes them; sums are float32. Where a processor multiplies tiles of
   bfloat16 (AMX), libraries that use these are faster. */
#include "common.h"

#define ROWS 8
#define VECTORS (COLUMNS / 16)

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDE_PRODUCTS 1
#else
#define WIDE_PRODUCTS 0
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define NARROW_PRODUCTS 1
#else
#define NARROW_PRODUCTS 0
#endif

/* Whether `multiply` is there for a type. */
int can_multiply(int narrow) { return narrow ? NARROW_PRODUCTS : WIDE_PRODUCTS; }

typedef struct {
    const void *weight; /* c [outputs, inputs] */
    void *panels;       /* c [outputs rounded up to whole panels x inputs] */
    integer outputs, inputs;
    int narrow;
} layout;

static void lay_out_panels(const void *given, integer begin, integer end, int thread) {
    (void)thread;
    const layout *a = given;
    const integer together = a->narrow ? 2 : 1, size = a->narrow ? 2 : 4;
    for (integer panel = begin; panel < end; panel++)
        for (integer input = 0; input < a->inputs; input += together)
            for (integer column = 0; column < COLUMNS; column++) {
                const integer output = panel * COLUMNS + column;
                void *place = to(a->panels, panel * COLUMNS * a->inputs + input * COLUMNS + column * together, a->narrow);
                if (output < a->outputs)
                    memcpy(place, from(a->weight, output * a->inputs + input, a->narrow), (size_t)(together * size));
                else
                    memset(place, 0, (size_t)(together * size));
            }
}

void lay_out(const void *weight, void *panels, integer outputs, integer inputs, int narrow, int threads) {
    layout a = {weight, panels, outputs, inputs, narrow};
    deal(lay_out_panels, &a, (outputs + COLUMNS - 1) / COLUMNS, threads);
}

#if WIDE_PRODUCTS

typedef struct {
    const void *x;      /* c [rows, inputs] */
    const void *panels; /* as laid out */
    const void *bias;   /* c [outputs]; NULL: zeros */
    void *out;          /* c [rows, outputs] */
    integer rows, inputs, outputs;
} product;

/* `rows` rows, at most ROWS, times a panel; what is `next` is fetched meanwhile. */
INLINE void block(const product *a, const void *x, const void *panel, const void *next, integer first, void *out,
                  const int rows, const int narrow) {
    __m512 sums[ROWS][VECTORS];
    float start[COLUMNS];
    for (int column = 0; column < COLUMNS; column++)
        start[column] = a->bias && first + column < a->outputs ? get(a->bias, first + column, narrow) : 0.0f;
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < VECTORS; part++) sums[row][part] = _mm512_loadu_ps(start + 16 * part);
    const integer step = narrow ? 2 : 1;
    for (integer input = 0; input < a->inputs; input += step) {
        const char *here = from(panel, input * COLUMNS, narrow), *then = from(next, input * COLUMNS, narrow);
        for (int part = 0; part < VECTORS; part++) __builtin_prefetch(then + 64 * part, 0, 2);
        for (int row = 0; row < rows; row++) {
            const void *mine = from(x, row * a->inputs + input, narrow);
#if NARROW_PRODUCTS
            if (narrow) {
                int32_t pair;
                memcpy(&pair, mine, 4);
                for (int part = 0; part < VECTORS; part++)
                    sums[row][part] = _mm512_dpbf16_ps(sums[row][part], (__m512bh)_mm512_set1_epi32(pair),
                                                       (__m512bh)_mm512_loadu_si512(here + 64 * part));
                continue;
            }
#endif
            for (int part = 0; part < VECTORS; part++)
                sums[row][part] = _mm512_fmadd_ps(_mm512_set1_ps(*(const float *)mine),
                                                  _mm512_loadu_ps((const float *)here + 16 * part), sums[row][part]);
        }
    }
    for (int row = 0; row < rows; row++) {
        float numbers[COLUMNS];
        for (int part = 0; part < VECTORS; part++) _mm512_storeu_ps(numbers + 16 * part, sums[row][part]);
        void *place = to(out, row * a->outputs + first, narrow);
        if (first + COLUMNS <= a->outputs) {
#pragma omp simd
            for (int column = 0; column < COLUMNS; column++) put(place, column, numbers[column], narrow);
        } else {
            for (integer column = 0; first + column < a->outputs; column++) put(place, column, numbers[column], narrow);
        }
    }
}

INLINE void multiply_panels(const product *a, integer begin, integer end, const int narrow) {
    for (integer number = begin; number < end; number++) {
        const void *panel = from(a->panels, number * COLUMNS * a->inputs, narrow);
        const void *next = from(panel, COLUMNS * a->inputs, narrow);
        const integer first = number * COLUMNS;
        for (integer row = 0; row < a->rows; row += ROWS) {
            const void *x = from(a->x, row * a->inputs, narrow);
            void *out = to(a->out, row * a->outputs, narrow);
            const void *then = row == 0 ? next : panel; /* once is enough */
            switch (a->rows - row) {
            case 1: block(a, x, panel, then, first, out, 1, narrow); break;
            case 2: block(a, x, panel, then, first, out, 2, narrow); break;
            case 3: block(a, x, panel, then, first, out, 3, narrow); break;
            case 4: block(a, x, panel, then, first, out, 4, narrow); break;
            case 5: block(a, x, panel, then, first, out, 5, narrow); break;
            case 6: block(a, x, panel, then, first, out, 6, narrow); break;
            case 7: block(a, x, panel, then, first, out, 7, narrow); break;
            default: block(a, x, panel, then, first, out, ROWS, narrow);
            }
        }
    }
}

static void multiply_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    multiply_panels(a, begin, end, 0);
}

#if NARROW_PRODUCTS
static void multiply_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    multiply_panels(a, begin, end, 1);
}
#endif

#endif

/* Only where `can_multiply` says so; a pair of inputs in bfloat16 is whole. */
void multiply(const void *x, const void *panels, const void *bias, void *out, integer rows, integer inputs,
              integer outputs, int narrow, int threads) {
#if WIDE_PRODUCTS
    product a = {x, panels, bias, out, rows, inputs, outputs};
    const integer count = (outputs + COLUMNS - 1) / COLUMNS;
#if NARROW_PRODUCTS
    deal(narrow ? multiply_narrow : multiply_wide, &a, count, threads);
#else
    (void)narrow;
    deal(multiply_wide, &a, count, threads);
#endif
#else
    (void)x, (void)panels, (void)bias, (void)out, (void)rows, (void)inputs, (void)outputs, (void)narrow, (void)threads;
#endif
}
