/* Matrix products of linear layers, for processors with vectors of 256 or 512 bits. Sums are float32, each in an order of
   its own that no number of rows or threads changes.

   A unit is what a processor's product takes at once of each factor: a number in float32, or two of bfloat16 that follow
   one another (where it multiplies such; else one, in float32). A panel is COLUMNS columns of the second factor, unit by
   unit, in the order in which they are read: laid out beforehand where a matrix stays, else by the thread that needs
   it. */
#include "common.h"

#define VECTORS 2
#define COLUMNS (VECTORS * WIDTH)
#define DEPTH 1024        /* units that are laid out and added up at a time: a panel of them stays in the cache */
#define SLAB (128 * ROWS) /* rows of the first factor that are laid out at a time, where they have to be */
#define BYTES (1 << 20)   /* of the first factor that all panels are multiplied by before more is read: between */
#define MOST 1024         /* so many rows of it */
#define FEW 256           /* and so many; of longer rows than DEPTH also at most: their sums are kept meanwhile */

typedef uint32_t unit;

static integer units_of(integer inner, int narrow);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE_PRODUCTS 1
#include "vectors512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDE_PRODUCTS 1
#include "vectors256.h"
#else
#define WIDE_PRODUCTS 0
#define NARROW_PRODUCTS 0
#define WIDTH 1
#define ROWS 1
#define ACROSS 1
#define PAIR 1
#endif

/* What callers must know: outputs of a matrix in a panel; numbers of bfloat16 in a unit. */
const integer columns = COLUMNS, pair = PAIR;

/* Which of the two factors is given turned. */
enum { TURNED_SECOND, TURNED_NONE, TURNED_FIRST };

/* Whether there are products of a type; without, the functions below must not be called. */
int can_multiply(int narrow) { return narrow ? NARROW_PRODUCTS : WIDE_PRODUCTS; }

/* Numbers in a unit. */
INLINE integer per_unit(int narrow) { return narrow ? PAIR : 1; }

static integer units_of(integer inner, int narrow) { return (inner + per_unit(narrow) - 1) / per_unit(narrow); }

/* Whether the first factor is laid out before it is multiplied: where its units are not to be had by reading it. */
static int laid_out_first(integer form, int narrow) { return form == TURNED_FIRST || (narrow && PAIR == 1); }

/* Units of scratch that a thread needs for itself. */
static integer own_scratch(integer inner, int narrow) {
    const integer units = units_of(inner, narrow);
    return COLUMNS * (at_most(units, DEPTH) + (units > DEPTH ? FEW + ROWS : 0)); /* a group is whole blocks */
}

/* Units of scratch that `product` needs. */
integer product_scratch(integer rows, integer inner, integer form, int narrow, int threads) {
    const integer own = own_scratch(inner, narrow) * threads, units = units_of(inner, narrow);
    if (!laid_out_first(form, narrow)) return own;
    return own + at_most(up_to(rows, ACROSS), SLAB) *
                     (form == TURNED_FIRST ? at_most(units, DEPTH) : units);
}

/* Units of scratch that `multiply` needs. */
integer multiply_scratch(integer rows, integer inputs, int narrow) {
    return laid_out_first(TURNED_SECOND, narrow) ? rows * units_of(inputs, narrow) : 0;
}

#if WIDE_PRODUCTS

/* `rows` of the first factor: a row's units lie `along` bytes apart, the rows themselves `across`. */
typedef struct {
    const char *x;
    integer across, along;
} factor;

typedef struct {
    const void *bias; /* c [columns]; NULL: zeros */
    char *out;        /* the first row's place; c, or float32 if `wide` */
    integer stride, columns;
    int wide, adds;      /* to what `out` holds; only if `wide` */
    int continues, ends; /* there are units before; there are none behind, and `out` is written */
    float *sums;         /* [rows, COLUMNS] of the units before and of these; NULL: these are all */
} result;

/* `rows` rows, at most ROWS, times a panel whose first column is `first`. `stays`: the panel is of a matrix that stays, and
   `next` is fetched meanwhile. */
INLINE void block(const factor *a, const char *panel, const char *next, integer units, const result *made, integer first,
                  const int rows, const int vectors, const int narrow, const int stays) {
    const integer size = COLUMNS * PANEL_SIZE(narrow, stays);
    numbers sums[ROWS][VECTORS];
    integer there[VECTORS];
    for (int part = 0; part < vectors; part++) {
        there[part] = at_most(made->columns - first - WIDTH * part, WIDTH);
        const numbers start = made->bias && !made->continues
                                  ? loaded(from(made->bias, first + WIDTH * part, narrow), there[part], narrow)
                                  : (numbers){0};
        for (int row = 0; row < rows; row++) sums[row][part] = start;
    }
    for (integer k = 0; k < units; k++) {
        if (stays)
            for (int line = 0; line < size; line += 64) __builtin_prefetch(next + k * size + line, 0, 2);
        numbers theirs[VECTORS];
        for (int part = 0; part < vectors; part++)
            theirs[part] = of_panel(panel + k * size + part * (size / VECTORS), narrow, stays);
        for (int row = 0; row < rows; row++) {
            const numbers mine = all_of(a->x + row * a->across + k * a->along);
            for (int part = 0; part < vectors; part++) sums[row][part] = more(sums[row][part], mine, theirs[part], narrow);
        }
    }
    const int thin = narrow && !made->wide;
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < vectors; part++) {
            void *place = to(made->out, row * made->stride + first + WIDTH * part, thin);
            const integer kept = row * COLUMNS + WIDTH * part;
            if (made->continues) sums[row][part] += loaded(made->sums + kept, WIDTH, 0);
            if (!made->ends) {
                stored(made->sums + kept, WIDTH, sums[row][part], 0);
                continue;
            }
            if (made->adds) sums[row][part] += loaded(place, there[part], 0);
            stored(place, there[part], sums[row][part], thin);
        }
}

/* At most ROWS rows; each number of them by a loop of its own, as are ROWS of them times half a panel or less. */
INLINE void some_rows(const factor *a, const char *panel, const char *next, integer units, const result *made,
                      integer first, integer rows, const int narrow, const int stays) {
#define CASE(rows)                                                           \
    case rows: block(a, panel, next, units, made, first, rows, VECTORS, narrow, stays); break;
    if (rows >= ROWS && made->columns - first <= WIDTH) {
        block(a, panel, next, units, made, first, ROWS, 1, narrow, stays);
        return;
    }
    switch (at_most(rows, ROWS)) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS == 8
        CASE(7) CASE(8)
#endif
    }
#undef CASE
}

/* --- a matrix that stays ------------------------------------------------------------------------------------------ */

typedef struct {
    const char *weight; /* c [outputs, inputs] */
    char *panels;       /* c [outputs rounded up to whole panels, inputs] */
    integer outputs, inputs;
    int narrow;
} layout;

static void lay_out_panels(const void *given, integer begin, integer end, int thread) {
    (void)thread;
    const layout *a = given;
    for (integer panel = begin; panel < end; panel++) {
        const integer first = panel * COLUMNS;
        lay_out_panel(from(a->weight, first * a->inputs, a->narrow), a->outputs - first, a->inputs,
                      to(a->panels, first * a->inputs, a->narrow), a->narrow);
    }
}

typedef struct {
    const void *x;      /* c [rows, inputs] */
    const void *panels;
    const void *bias;
    void *out;          /* c [rows, outputs] */
    unit *laid_out;     /* [rows, units], if x must be */
    integer rows, inputs, outputs;
} laid_out_product;

INLINE void multiply_panels(const laid_out_product *a, integer begin, integer end, const int narrow) {
    const integer units = units_of(a->inputs, narrow);
    const void *first = laid_out_first(TURNED_SECOND, narrow) ? a->laid_out : a->x;
    for (integer number = begin; number < end; number++) {
        const char *panel = from(a->panels, number * COLUMNS * a->inputs, narrow);
        for (integer row = 0; row < a->rows; row += ROWS) {
            const factor x = {(const char *)first + row * units * 4, units * 4, 4};
            const result made = {a->bias, to(a->out, row * a->outputs, narrow), a->outputs, a->outputs, 0, 0, 0, 1, 0};
            /* Once is enough; what has been fetched costs little. */
            const int more_panels = row == 0 && (number + 1) * COLUMNS < a->outputs;
            const char *next = more_panels ? from(panel, COLUMNS * a->inputs, narrow) : panel;
            some_rows(&x, panel, next, units, &made, number * COLUMNS, a->rows - row, narrow, 1);
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
    unit *scratch;  /* [threads, own] */
    unit *laid_out; /* the rows of x, where they must be: [rows, units], or if turned [rows / ROWS, units, ROWS] */
    integer rows, inner, columns, x_stride, y_stride, out_stride, own, groups, parts;
    int form, adds;
} product_of;

/* Units begin..end of a panel whose first column is `first`. */
INLINE void pack_panel(const product_of *a, integer first, integer begin, integer end, unit *panel, const int narrow) {
    const integer before = begin * per_unit(narrow), inner = at_most(end * per_unit(narrow), a->inner) - before;
    if (a->form == TURNED_SECOND)
        pack_turned(from(a->y, first * a->y_stride + before, narrow), a->y_stride, a->columns - first, inner, panel,
                    narrow);
    else
        pack_straight(from(a->y, before * a->y_stride + first, narrow), a->y_stride, a->columns - first, inner, panel,
                      narrow);
}

/* The rows of x from `row` on, from unit `start` on. */
INLINE factor first_factor(const product_of *a, integer row, integer start, const int narrow) {
    const integer units = units_of(a->inner, narrow);
    if (a->form == TURNED_FIRST) return (factor){(const char *)(a->laid_out + row * units + start * ROWS), 4, 4 * ROWS};
    if (laid_out_first(a->form, narrow)) return (factor){(const char *)(a->laid_out + row * units + start), units * 4, 4};
    return (factor){(const char *)from(a->x, row * a->x_stride, narrow) + 4 * start, a->x_stride * (narrow ? 2 : 4), 4};
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
            const factor x = first_factor(a, row, start, narrow);
            const result made = {a->bias, to(a->out, row * a->out_stride, narrow && !wide), a->out_stride, a->columns,
                                 wide, a->adds, start > 0, start + count == units,
                                 whole ? 0 : sums + (row - begin) * COLUMNS};
            some_rows(&x, (const char *)panel, 0, count, &made, first, a->rows - row, narrow, 0);
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

static void do_product(product_of a, int narrow, int threads) {
    const integer units = units_of(a.inner, narrow), fitting = at_most(BYTES / (4 * units + 1), MOST);
    const integer size = units > DEPTH || fitting < FEW ? FEW : fitting;
    a.groups = a.rows > size ? (a.rows + size - 1) / size : 1;
    a.parts = ((a.rows + a.groups - 1) / a.groups + 63) / 64; /* a thread takes its own of a panel together */
    deal(narrow ? product_narrow : product_wide, &a, a.groups * a.parts * ((a.columns + COLUMNS - 1) / COLUMNS), threads);
}

/* --- the first factor --------------------------------------------------------------------------------------------- */

/* Items are ACROSS rows. */
INLINE void lay_out_turned(const product_of *a, integer begin, integer end, const int narrow) {
    for (integer row = begin * ACROSS; row < end * ACROSS; row += ACROSS)
        pack_blocks(from(a->x, row, narrow), a->x_stride, a->rows - row, a->inner,
                    a->laid_out + row * units_of(a->inner, narrow), narrow);
}

static void lay_out_turned_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    lay_out_turned(a, begin, end, 0);
}

static void lay_out_turned_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    lay_out_turned(a, begin, end, 1);
}

/* x bfloat16 [count, inner], whose rows lie `stride` apart -> float32. */
typedef struct {
    const char *x;
    float *out;
    integer inner, stride;
} widening;

static void widen_rows(const void *given, integer begin, integer end, int thread) {
    (void)thread;
    const widening *a = given;
    for (integer row = begin; row < end; row++)
        widen(from(a->x, row * a->stride, 1), a->out + row * a->inner, a->inner, 1);
}
#endif

/* weight c [outputs, inputs] -> panels. Units of inputs are whole. */
void lay_out(const void *weight, void *panels, integer outputs, integer inputs, int narrow, int threads) {
#if WIDE_PRODUCTS
    layout a = {weight, panels, outputs, inputs, narrow};
    deal(lay_out_panels, &a, (outputs + COLUMNS - 1) / COLUMNS, threads);
#else
    (void)weight, (void)panels, (void)outputs, (void)inputs, (void)narrow, (void)threads;
#endif
}

/* x c [rows, inputs], panels of weight, bias c [outputs] or NULL -> x weight' + bias c [rows, outputs]. */
void multiply(const void *x, const void *panels, const void *bias, void *out, void *scratch, integer rows,
              integer inputs, integer outputs, int narrow, int threads) {
#if WIDE_PRODUCTS
    laid_out_product a = {x, panels, bias, out, scratch, rows, inputs, outputs};
    widening first = {x, scratch, inputs, inputs};
    if (laid_out_first(TURNED_SECOND, narrow)) widen_rows(&first, 0, rows, 0);
    deal(narrow ? multiply_narrow : multiply_wide, &a, (outputs + COLUMNS - 1) / COLUMNS, threads);
#else
    (void)x, (void)panels, (void)bias, (void)out, (void)scratch, (void)rows, (void)inputs, (void)outputs;
    (void)narrow, (void)threads;
#endif
}

/* By `form`, for factors whose rows lie x_stride and y_stride numbers apart:
   TURNED_SECOND  x [rows, inner], y [columns, inner], bias [columns] or NULL -> x y' + bias, c [rows, columns]
   TURNED_NONE    x [rows, inner], y [inner, columns] -> x y, c [rows, columns]
   TURNED_FIRST   x [inner, rows], y [inner, columns] -> x' y, float32 [rows, columns], added to `out` if `adds`
   Units of x are whole, but for TURNED_FIRST. */
void product(const void *x, const void *y, const void *bias, void *out, void *scratch, integer rows, integer inner,
             integer columns, integer x_stride, integer y_stride, integer out_stride, integer form, integer adds,
             int narrow, int threads) {
#if WIDE_PRODUCTS
    product_of a = {x, y, bias, out, scratch, 0, rows, inner, columns, x_stride, y_stride, out_stride,
                    own_scratch(inner, narrow), 1, 1, (int)form, (int)adds};
    if (!laid_out_first(form, narrow)) {
        do_product(a, narrow, threads);
        return;
    }
    const int turned = form == TURNED_FIRST, thin = narrow && !turned;
    const integer deep = turned ? DEPTH * per_unit(narrow) : inner > 0 ? inner : 1;
    a.laid_out = a.scratch + a.own * threads;
    for (integer start = 0; start < inner || start == 0; start += deep) {
        a.inner = at_most(inner - start, deep);
        a.y = from(y, start * y_stride, narrow);
        a.adds = adds || start > 0;
        for (integer begin = 0; begin < rows; begin += SLAB) {
            a.rows = at_most(rows - begin, SLAB);
            a.x = from(x, turned ? start * x_stride + begin : begin * x_stride, narrow);
            a.out = to(out, begin * out_stride, thin);
            if (turned) {
                deal(narrow ? lay_out_turned_narrow : lay_out_turned_wide, &a, (a.rows + ACROSS - 1) / ACROSS, threads);
            } else {
                widening first = {a.x, (float *)a.laid_out, inner, x_stride};
                deal(widen_rows, &first, a.rows, threads);
            }
            do_product(a, narrow, threads);
        }
    }
#else
    (void)x, (void)y, (void)bias, (void)out, (void)scratch, (void)rows, (void)inner, (void)columns, (void)x_stride;
    (void)y_stride, (void)out_stride, (void)form, (void)adds, (void)narrow, (void)threads;
#endif
}
