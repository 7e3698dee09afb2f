/* Matrix products of linear layers, for processors with 512-bit vectors. Sums are float32, each in an order of its own
   that no number of rows or threads changes; subnormal numbers of bfloat16 count as zeros.

   A unit is what a processor's product takes at once of each factor: a number in float32, two that follow one another
   in bfloat16. A panel is COLUMNS columns of the second factor, unit by unit, in the order in which they are read: laid
   out beforehand where a matrix stays, else by the thread that needs it. Where a processor multiplies tiles of bfloat16
   (AMX), libraries that use these are faster. */
#include "common.h"

#define ROWS 8
#define VECTORS (COLUMNS / 16)
#define DEPTH 1024      /* units that are laid out and added up at a time: a panel of them stays in the cache */
#define SLAB 1024       /* columns of the first factor that are laid out at a time, where it has to be */
#define BYTES (1 << 20) /* of the first factor that all panels are multiplied by before more is read */
#define GROUP 1024      /* rows of it, at most: their sums over more than DEPTH units are kept meanwhile */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE_PRODUCTS 1
#else
#define WIDE_PRODUCTS 0
#endif
#if WIDE_PRODUCTS && defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define NARROW_PRODUCTS 1
#else
#define NARROW_PRODUCTS 0
#endif

/* Which of the two factors is given turned. */
enum { TURNED_SECOND, TURNED_NONE, TURNED_FIRST };

/* Whether there are products of a type; without, the functions below must not be called. */
int can_multiply(int narrow) { return narrow ? NARROW_PRODUCTS : WIDE_PRODUCTS; }

static integer units_of(integer inner, int narrow) { return narrow ? (inner + 1) / 2 : inner; }

static integer at_most(integer number, integer most) { return number < most ? number : most; }

/* Units of scratch that a thread needs for itself. */
static integer own_scratch(integer inner, int narrow) {
    const integer units = units_of(inner, narrow);
    return COLUMNS * (at_most(units, DEPTH) + (units > DEPTH ? GROUP : 0));
}

/* Units of scratch that `product` needs. */
integer product_scratch(integer rows, integer inner, integer form, int narrow, int threads) {
    const integer blocked = at_most((rows + COLUMNS - 1) / COLUMNS * COLUMNS, SLAB);
    return own_scratch(inner, narrow) * threads +
           (form == TURNED_FIRST ? blocked * at_most(units_of(inner, narrow), DEPTH) : 0);
}

#if WIDE_PRODUCTS

typedef uint32_t unit;

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

/* A panel of a matrix whose rows are the panel's columns: c [columns, inner], of which `columns`, at most COLUMNS, are
   there; the others are zeros. */
static void pack_turned(const char *matrix, integer stride, integer columns, integer inner, unit *panel,
                        const int narrow) {
    const integer size = narrow ? 2 : 4, bytes = inner * size, units = (bytes + 3) / 4;
    for (integer start = 0; start < units; start += 16) {
        const integer count = units - start < 16 ? units - start : 16, left = bytes - start * 4;
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

/* The panels, each `width` columns wide, of COLUMNS columns of a matrix c [inner, columns], of which `columns` are there;
   the others are zeros. Narrower panels than COLUMNS lie `next` units apart. */
static void pack_straight(const char *matrix, integer stride, integer columns, integer inner, unit *panels,
                          const int width, integer next, const int narrow) {
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

/* `rows` of the first factor: a row's units lie `along` bytes apart, the rows themselves `across`. */
typedef struct {
    const char *x;
    integer across, along;
} factor;

typedef struct {
    const void *bias; /* c [columns]; NULL: zeros */
    char *out;        /* the first row's place; c, or float32 if `wide` */
    integer stride, columns;
    int wide, adds;     /* to what `out` holds; only if `wide` */
    float *sums;        /* [rows, COLUMNS]: sums of the units before and of these; NULL: these are all */
    int continues, ends; /* there are units before; there are none behind, and `out` is written */
} result;

/* 16 numbers of type c, of which `there` are there. */
INLINE __m512 loaded(const void *numbers, __mmask16 there, const int narrow) {
    if (!narrow) return _mm512_maskz_loadu_ps(there, numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, numbers)), 16));
}

INLINE void stored(void *place, __mmask16 there, __m512 numbers, const int narrow) {
#if NARROW_PRODUCTS
    if (narrow) {
        _mm256_mask_storeu_epi16(place, there, (__m256i)_mm512_cvtneps_pbh(numbers)); /* to the nearest, ties to even */
        return;
    }
#endif
    (void)narrow;
    _mm512_mask_storeu_ps(place, there, numbers);
}

/* `rows` rows, at most ROWS, times a panel whose first column is `first`; what is `next`, if anything, is fetched
   meanwhile. */
INLINE void block(const factor *a, const unit *panel, const unit *next, integer units, const result *made, integer first,
                  const int rows, const int vectors, const int narrow) {
    __m512 sums[ROWS][VECTORS];
    __mmask16 there[VECTORS];
    for (int part = 0; part < vectors; part++) {
        const integer left = made->columns - first - 16 * part;
        there[part] = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        const __m512 start =
            made->bias && !made->continues ? loaded(from(made->bias, first + 16 * part, narrow), there[part], narrow) : _mm512_setzero_ps();
        for (int row = 0; row < rows; row++) sums[row][part] = start;
    }
    for (integer k = 0; k < units; k++, panel += COLUMNS) {
        if (next)
            for (int part = 0; part < VECTORS; part++, next += 16) __builtin_prefetch(next, 0, 2);
        for (int row = 0; row < rows; row++) {
            int32_t bits;
            memcpy(&bits, a->x + row * a->across + k * a->along, 4);
            const __m512i mine = _mm512_set1_epi32(bits);
            for (int part = 0; part < vectors; part++) {
                const __m512i theirs = _mm512_loadu_si512(panel + 16 * part);
                __m512 *sum = &sums[row][part];
#if NARROW_PRODUCTS
                if (narrow) {
                    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)mine, (__m512bh)theirs);
                    continue;
                }
#endif
                *sum = _mm512_fmadd_ps(_mm512_castsi512_ps(mine), _mm512_castsi512_ps(theirs), *sum);
            }
        }
    }
    const int thin = narrow && !made->wide;
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < vectors; part++) {
            void *place = to(made->out, row * made->stride + first + 16 * part, thin);
            float *kept = made->sums + row * COLUMNS + 16 * part;
            if (made->sums && made->continues) sums[row][part] = _mm512_add_ps(sums[row][part], _mm512_loadu_ps(kept));
            if (made->sums && !made->ends) {
                _mm512_storeu_ps(kept, sums[row][part]);
                continue;
            }
            if (made->adds) sums[row][part] = _mm512_add_ps(sums[row][part], loaded(place, there[part], 0));
            stored(place, there[part], sums[row][part], thin);
        }
}

/* Fewer rows than ROWS, or columns than COLUMNS, by loops of their own. */
INLINE void some_rows(const factor *a, const unit *panel, const unit *next, integer units, const result *made,
                      integer first, integer rows, const int narrow) {
#define CASE(rows)                                                                         \
    case rows:                                                                             \
        if (made->columns - first > 16)                                                    \
            block(a, panel, next, units, made, first, rows, VECTORS, narrow);              \
        else                                                                               \
            block(a, panel, next, units, made, first, rows, 1, narrow);                    \
        break;
    switch (rows < ROWS ? rows : ROWS) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(ROWS) }
#undef CASE
}

/* --- a matrix that stays ------------------------------------------------------------------------------------------ */

typedef struct {
    const char *weight; /* c [outputs, inputs] */
    unit *panels;       /* [outputs rounded up to whole panels, inputs] */
    integer outputs, inputs;
    int narrow;
} layout;

static void lay_out_panels(const void *given, integer begin, integer end, int thread) {
    (void)thread;
    const layout *a = given;
    const integer units = a->narrow ? a->inputs / 2 : a->inputs;
    for (integer panel = begin; panel < end; panel++)
        pack_turned(from(a->weight, panel * COLUMNS * a->inputs, a->narrow), a->inputs, a->outputs - panel * COLUMNS,
                    a->inputs, a->panels + panel * COLUMNS * units, a->narrow);
}

typedef struct {
    const void *x; /* c [rows, inputs] */
    const unit *panels;
    const void *bias;
    void *out; /* c [rows, outputs] */
    integer rows, inputs, outputs;
} laid_out_product;

INLINE void multiply_panels(const laid_out_product *a, integer begin, integer end, const int narrow) {
    const integer units = narrow ? a->inputs / 2 : a->inputs;
    for (integer number = begin; number < end; number++) {
        const unit *panel = a->panels + number * COLUMNS * units;
        for (integer row = 0; row < a->rows; row += ROWS) {
            const factor x = {from(a->x, row * a->inputs, narrow), units * 4, 4};
            const result made = {a->bias, to(a->out, row * a->outputs, narrow), a->outputs, a->outputs, 0, 0, 0, 0, 1};
            /* Once is enough. */
            const unit *next = row == 0 && (number + 1) * COLUMNS < a->outputs ? panel + COLUMNS * units : 0;
            some_rows(&x, panel, next, units, &made, number * COLUMNS, a->rows - row, narrow);
        }
    }
}

static void multiply_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    multiply_panels(a, begin, end, 0);
}

static void multiply_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    multiply_panels(a, begin, end, 1);
}

/* --- a matrix that is laid out as it is multiplied ---------------------------------------------------------------- */

typedef struct {
    const char *x, *y;
    const void *bias;
    char *out;
    unit *scratch; /* [threads, own] */
    unit *blocked; /* the rows of x, where it is given turned */
    integer rows, inner, columns, x_stride, y_stride, out_stride, own, groups, parts;
    int form, adds;
} product_of;

/* Units begin..end of a panel whose first column is `first`. */
INLINE void pack_panel(const product_of *a, integer first, integer begin, integer end, unit *panel, const int narrow) {
    const integer together = narrow ? 2 : 1, inner = at_most(end * together, a->inner) - begin * together;
    if (a->form == TURNED_SECOND)
        pack_turned(from(a->y, first * a->y_stride + begin * together, narrow), a->y_stride, a->columns - first, inner,
                    panel, narrow);
    else
        pack_straight(from(a->y, begin * together * a->y_stride + first, narrow), a->y_stride, a->columns - first, inner,
                      panel, COLUMNS, 0, narrow);
}

/* Rows begin..end, whole blocks but for the last, times a panel whose first column is `first`. `packed`: the panel that
   lies in the thread's scratch, or -1. */
INLINE void product_rows(const product_of *a, integer first, integer begin, integer end, unit *panel, integer *packed,
                         const int narrow) {
    const integer units = units_of(a->inner, narrow);
    float *sums = (float *)(panel + COLUMNS * DEPTH);
    const int wide = a->form == TURNED_FIRST, whole = units <= DEPTH;
    for (integer start = 0; start < units || start == 0; start += DEPTH) {
        const integer count = at_most(units - start, DEPTH);
        if (!whole || *packed != first) pack_panel(a, first, start, start + count, panel, narrow);
        *packed = whole ? first : -1;
        for (integer row = begin; row < end; row += ROWS) {
            factor x = {(const char *)from(a->x, row * a->x_stride, narrow) + 4 * start,
                        a->x_stride * (narrow ? 2 : 4), 4};
            if (wide) x = (factor){(const char *)(a->blocked + row * units), 4, 4 * ROWS};
            const result made = {a->bias, to(a->out, row * a->out_stride, narrow && !wide), a->out_stride, a->columns,
                                 wide, a->adds, whole ? 0 : sums + (row - begin) * COLUMNS, start > 0,
                                 start + count == units};
            some_rows(&x, panel, 0, count, &made, first, a->rows - row, narrow);
        }
    }
}

/* Items are groups of rows, in each of them panels, and of each of these parts of the group's rows. */
INLINE void product_panels(const product_of *a, integer begin, integer end, int thread, const int narrow) {
    const integer all = (a->rows + ROWS - 1) / ROWS, panels = (a->columns + COLUMNS - 1) / COLUMNS;
    integer packed = -1;
    while (begin < end) {
        /* All the parts of this group and panel that are this thread's. */
        const integer number = begin / a->parts, stop = at_most(end, (number + 1) * a->parts);
        const integer group = number / panels, before = all * group / a->groups;
        const integer within = all * (group + 1) / a->groups - before;
        const integer row = (before + within * (begin - number * a->parts) / a->parts) * ROWS;
        const integer last = (before + within * (stop - number * a->parts) / a->parts) * ROWS;
        product_rows(a, number % panels * COLUMNS, row, at_most(last, a->rows), a->scratch + thread * a->own, &packed,
                     narrow);
        begin = stop;
    }
}

static void product_wide(const void *a, integer begin, integer end, int thread) {
    product_panels(a, begin, end, thread, 0);
}

static void product_narrow(const void *a, integer begin, integer end, int thread) {
    product_panels(a, begin, end, thread, 1);
}

INLINE void block_columns(const product_of *a, integer begin, integer end, const int narrow) {
    const integer units = units_of(a->inner, narrow);
    for (integer item = begin; item < end; item++) {
        const integer column = item * COLUMNS;
        pack_straight(from(a->x, column, narrow), a->x_stride, a->rows - column, a->inner, a->blocked + column * units,
                      ROWS, ROWS * units, narrow);
    }
}

static void block_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    block_columns(a, begin, end, 0);
}

static void block_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    block_columns(a, begin, end, 1);
}

static void do_product(product_of a, int narrow, int threads) {
    const integer fitting = BYTES / (4 * units_of(a.inner, narrow) + 1), size = fitting < 256 ? 256 : at_most(fitting, GROUP);
    a.groups = a.rows > size ? (a.rows + size - 1) / size : 1;
    a.parts = ((a.rows + a.groups - 1) / a.groups + 63) / 64; /* a thread takes its own of a panel together */
    deal(narrow ? product_narrow : product_wide, &a, a.groups * a.parts * ((a.columns + COLUMNS - 1) / COLUMNS), threads);
}
#endif

/* weight c [outputs, inputs] -> panels. A pair of inputs in bfloat16 is whole. */
void lay_out(const void *weight, void *panels, integer outputs, integer inputs, int narrow, int threads) {
#if WIDE_PRODUCTS
    layout a = {weight, panels, outputs, inputs, narrow};
    deal(lay_out_panels, &a, (outputs + COLUMNS - 1) / COLUMNS, threads);
#else
    (void)weight, (void)panels, (void)outputs, (void)inputs, (void)narrow, (void)threads;
#endif
}

/* x c [rows, inputs], panels of weight, bias c [outputs] or NULL -> x weight' + bias c [rows, outputs]. */
void multiply(const void *x, const void *panels, const void *bias, void *out, integer rows, integer inputs,
              integer outputs, int narrow, int threads) {
#if WIDE_PRODUCTS
    laid_out_product a = {x, panels, bias, out, rows, inputs, outputs};
    deal(narrow ? multiply_narrow : multiply_wide, &a, (outputs + COLUMNS - 1) / COLUMNS, threads);
#else
    (void)x, (void)panels, (void)bias, (void)out, (void)rows, (void)inputs, (void)outputs, (void)narrow, (void)threads;
#endif
}

/* By `form`, for factors whose rows lie x_stride and y_stride numbers apart:
   TURNED_SECOND  x [rows, inner], y [columns, inner], bias [columns] or NULL -> x y' + bias, c [rows, columns]
   TURNED_NONE    x [rows, inner], y [inner, columns] -> x y, c [rows, columns]
   TURNED_FIRST   x [inner, rows], y [inner, columns] -> x' y, float32 [rows, columns], added to `out` if `adds`
   Pairs of bfloat16 in x are whole, but for TURNED_FIRST. */
void product(const void *x, const void *y, const void *bias, void *out, void *scratch, integer rows, integer inner,
             integer columns, integer x_stride, integer y_stride, integer out_stride, integer form, integer adds,
             int narrow, int threads) {
#if WIDE_PRODUCTS
    product_of a = {x, y, bias, out, scratch, 0, rows, inner, columns, x_stride, y_stride, out_stride,
                    own_scratch(inner, narrow), 1, 1, (int)form, (int)adds};
    if (form != TURNED_FIRST) {
        do_product(a, narrow, threads);
        return;
    }
    const integer deep = DEPTH * (narrow ? 2 : 1);
    a.blocked = a.scratch + a.own * threads;
    for (integer start = 0; start < inner || start == 0; start += deep) {
        a.inner = at_most(inner - start, deep);
        a.y = from(y, start * y_stride, narrow);
        a.adds = adds || start > 0;
        for (integer begin = 0; begin < rows; begin += SLAB) {
            a.rows = at_most(rows - begin, SLAB);
            a.x = from(x, start * x_stride + begin, narrow);
            a.out = to(out, begin * out_stride, 0);
            deal(narrow ? block_narrow : block_wide, &a, (a.rows + COLUMNS - 1) / COLUMNS, threads);
            do_product(a, narrow, threads);
        }
    }
#else
    (void)x, (void)y, (void)bias, (void)out, (void)scratch, (void)rows, (void)inner, (void)columns, (void)x_stride;
    (void)y_stride, (void)out_stride, (void)form, (void)adds, (void)narrow, (void)threads;
#endif
}
