/* For products, vectors of 512 bits. In bfloat16 a unit is two numbers: their products are added in one step, in which
   subnormal numbers count as zeros. Where a processor multiplies tiles of bfloat16 (AMX), libraries that use these are
   faster. */
#include <immintrin.h>

#define WIDTH 16
#define ROWS 8
#define ACROSS COLUMNS
#define PAIR 2
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define NARROW_PRODUCTS 1
#else
#define NARROW_PRODUCTS 0
#endif

typedef __m512 numbers;

/* The first `left` of a vector, if so many. */
INLINE __mmask16 first_of(integer left) {
    return left >= WIDTH ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
}

/* A vector of numbers of type c, of which `left` are there; the others are zeros. */
INLINE numbers loaded(const void *place, integer left, const int narrow) {
    const __mmask16 there = first_of(left);
    if (!narrow) return _mm512_maskz_loadu_ps(there, place);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, place)), 16));
}

/* Rounds to the nearest, ties to even. */
INLINE void stored(void *place, integer left, numbers x, const int narrow) {
#if NARROW_PRODUCTS
    if (narrow) {
        _mm256_mask_storeu_epi16(place, first_of(left), (__m256i)_mm512_cvtneps_pbh(x));
        return;
    }
#endif
    (void)narrow;
    _mm512_mask_storeu_ps(place, first_of(left), x);
}

/* The unit at `place`, everywhere. */
INLINE numbers all_of(const char *place) {
    int32_t bits;
    memcpy(&bits, place, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}

/* Bytes of a unit in a panel. */
#define PANEL_SIZE(narrow, stays) 4

/* A vector of a panel. */
INLINE numbers of_panel(const char *place, const int narrow, const int stays) {
    (void)narrow, (void)stays;
    return _mm512_loadu_ps(place);
}

/* sum + mine times theirs. */
INLINE numbers more(numbers sum, numbers mine, numbers theirs, const int narrow) {
#if NARROW_PRODUCTS
    if (narrow) return _mm512_dpbf16_ps(sum, (__m512bh)mine, (__m512bh)theirs);
#endif
    (void)narrow;
    return _mm512_fmadd_ps(mine, theirs, sum);
}

/* 16 rows of 16 units, turned. */
INLINE void turn(__m512i rows[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0x88);
            a[i + 4 + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd);
    }
}

/* A panel of a matrix whose rows are the panel's columns: c [columns, inner]. Of COLUMNS those that are not there are
   zeros. */
static void pack_turned(const char *matrix, integer stride, integer columns, integer inner, unit *panel,
                        const int narrow) {
    const integer size = narrow ? 2 : 4, bytes = inner * size, units = units_of(inner, narrow);
    for (integer start = 0; start < units; start += 16) {
        const integer count = at_most(units - start, 16), left = bytes - start * 4;
        const __mmask64 there = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
        for (int part = 0; part < VECTORS; part++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = part * 16 + i < columns
                              ? _mm512_maskz_loadu_epi8(there, matrix + (part * 16 + i) * stride * size + start * 4)
                              : _mm512_setzero_si512();
            turn(rows);
            for (int i = 0; i < count; i++)
                _mm512_storeu_si512(panel + (start + i) * COLUMNS + part * 16, rows[i]);
        }
    }
}

/* Panels, each `width` columns wide, of COLUMNS columns of a matrix c [inner, columns], of which `columns` are there; the
   others are zeros. Narrower panels than COLUMNS lie `next` units apart. */
INLINE void pack_columns(const char *matrix, integer stride, integer columns, integer inner, unit *panels, const int width,
                         integer next, const int narrow) {
    const integer together = narrow ? 2 : 1, size = narrow ? 2 : 4, bytes = columns * size;
    const __mmask64 low = bytes >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
    const __mmask64 high = bytes >= 128 ? ~(__mmask64)0 : bytes > 64 ? ((__mmask64)1 << (bytes - 64)) - 1 : 0;
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i behind = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    for (integer k = 0; k < inner; k += together) {
        const char *row = matrix + k * stride * size;
        __m512i found[2];
        if (narrow) {
            const __m512i first = _mm512_maskz_loadu_epi8(low, row);
            const __m512i second = _mm512_maskz_loadu_epi8(k + 1 < inner ? low : 0, row + stride * size);
            found[0] = _mm512_permutex2var_epi16(first, order, second);
            found[1] = _mm512_permutex2var_epi16(first, behind, second);
        } else {
            found[0] = _mm512_maskz_loadu_epi8(low, row);
            found[1] = _mm512_maskz_loadu_epi8(high, row + 64);
        }
        unit *place = panels + k / together * width;
        if (width == COLUMNS) {
            _mm512_storeu_si512(place, found[0]);
            _mm512_storeu_si512(place + 16, found[1]);
        } else {
            for (int i = 0; i < 2; i++) {
                _mm256_storeu_si256((__m256i *)(place + 2 * i * next), _mm512_castsi512_si256(found[i]));
                _mm256_storeu_si256((__m256i *)(place + (2 * i + 1) * next), _mm512_extracti64x4_epi64(found[i], 1));
            }
        }
    }
}

/* A panel of a matrix c [inner, columns], of which `columns` are there; the others are zeros. */
static void pack_straight(const char *matrix, integer stride, integer columns, integer inner, unit *panel,
                          const int narrow) {
    pack_columns(matrix, stride, columns, inner, panel, COLUMNS, 0, narrow);
}

/* The same in panels of ROWS columns, ACROSS of them together. */
static void pack_blocks(const char *matrix, integer stride, integer columns, integer inner, unit *panels,
                        const int narrow) {
    pack_columns(matrix, stride, columns, inner, panels, ROWS, ROWS * units_of(inner, narrow), narrow);
}

/* A panel of a matrix that stays, of `columns` rows. */
static void lay_out_panel(const char *matrix, integer columns, integer inner, char *panel, const int narrow) {
    pack_turned(matrix, inner, columns, inner, (unit *)panel, narrow);
}
