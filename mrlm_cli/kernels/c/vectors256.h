/* For products, vectors of 256 bits. bfloat16 is multiplied in float32, which is exact: a unit is one number. */
#include <immintrin.h>

#define WIDTH 8
#define ROWS 6
#define ACROSS (4 * ROWS)
#define PAIR 1
#define NARROW_PRODUCTS 1

typedef __m256 numbers;
typedef uint32_t bits __attribute__((vector_size(32)));

/* A vector of numbers of type c, of which `left` are there; the others are zeros. */
INLINE numbers loaded(const void *place, integer left, const int narrow) {
    if (left < WIDTH) {
        float some[WIDTH] = {0};
        for (integer i = 0; i < left; i++) some[i] = get(place, i, narrow);
        return _mm256_loadu_ps(some);
    }
    if (!narrow) return _mm256_loadu_ps(place);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(place)), 16));
}

/* Rounds to the nearest, ties to even. Of numbers of bfloat16 a NaN has no low bits, and stays one. */
INLINE void stored(void *place, integer left, numbers x, const int narrow) {
    if (left < WIDTH) {
        float some[WIDTH];
        _mm256_storeu_ps(some, x);
        for (integer i = 0; i < left; i++) put(place, i, some[i], narrow);
        return;
    }
    if (!narrow) {
        _mm256_storeu_ps(place, x);
        return;
    }
    const bits exact = (bits)x;
    const __m256i rounded = (__m256i)((exact + 0x7fffu + ((exact >> 16) & 1u)) >> 16);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(place, _mm256_castsi256_si128(halves));
}

/* The unit at `place`, everywhere. */
INLINE numbers all_of(const char *place) {
    float number;
    memcpy(&number, place, 4);
    return _mm256_set1_ps(number);
}

/* Bytes of a unit in a panel: those of a matrix that stays are of its own type. */
#define PANEL_SIZE(narrow, stays) ((narrow) && (stays) ? 2 : 4)

/* A vector of a panel. */
INLINE numbers of_panel(const char *place, const int narrow, const int stays) {
    return loaded(place, WIDTH, narrow && stays);
}

/* sum + mine times theirs. */
INLINE numbers more(numbers sum, numbers mine, numbers theirs, const int narrow) {
    (void)narrow;
    return _mm256_fmadd_ps(mine, theirs, sum);
}

/* 8 rows of 8 units, turned. */
INLINE void turn(numbers rows[8]) {
    numbers a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
    for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
        rows[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
    }
}

/* A panel of a matrix whose rows are the panel's columns: c [columns, inner]. Of COLUMNS those that are not there are
   zeros. */
static void pack_turned(const char *matrix, integer stride, integer columns, integer inner, unit *panel,
                        const int narrow) {
    for (integer start = 0; start < inner; start += WIDTH)
        for (int part = 0; part < VECTORS; part++) {
            numbers rows[WIDTH];
            for (int i = 0; i < WIDTH; i++)
                rows[i] = part * WIDTH + i < columns
                              ? loaded(from(matrix, (part * WIDTH + i) * stride + start, narrow), inner - start, narrow)
                              : _mm256_setzero_ps();
            turn(rows);
            for (int i = 0; i < at_most(inner - start, WIDTH); i++)
                stored(panel + (start + i) * COLUMNS + part * WIDTH, WIDTH, rows[i], 0);
        }
}

/* A panel of a matrix c [inner, columns], of which `columns` are there; the others are zeros. */
static void pack_straight(const char *matrix, integer stride, integer columns, integer inner, unit *panel,
                          const int narrow) {
    for (integer k = 0; k < inner; k++)
        for (int part = 0; part < VECTORS; part++)
            stored(panel + k * COLUMNS + part * WIDTH, WIDTH,
                   loaded(from(matrix, k * stride + part * WIDTH, narrow), columns - part * WIDTH, narrow), 0);
}

/* The same in panels of ROWS columns, ACROSS of them together. */
static void pack_blocks(const char *matrix, integer stride, integer columns, integer inner, unit *panels,
                        const int narrow) {
    for (int first = 0; first < ACROSS; first += ROWS, panels += ROWS * inner) {
        const integer there = at_most(columns - first, ROWS);
        for (integer k = 0; k < inner; k++)
            for (int i = 0; i < ROWS; i++) {
                const float number = i < there ? get(matrix, k * stride + first + i, narrow) : 0.0f;
                memcpy(panels + k * ROWS + i, &number, 4);
            }
    }
}

/* A panel of a matrix that stays, of `columns` rows, in its own type. */
static void lay_out_panel(const char *matrix, integer columns, integer inner, char *panel, const int narrow) {
    const int size = narrow ? 2 : 4;
    for (integer k = 0; k < inner; k++)
        for (int i = 0; i < COLUMNS; i++, panel += size)
            if (i < columns)
                memcpy(panel, matrix + (i * inner + k) * size, size);
            else
                memset(panel, 0, size);
}
