/* Causal attention over rows that share their beginnings, and its gradient, all in float32. Formulas:
   kernels/attention.py.

   B rows of T places, of which N distinct prefixes are stored once; heads queries and kv_heads keys and values of d
   numbers; the heads / kv_heads queries of one key head lie together. An item is a row and a key head. Its keys and
   values are laid out once; then each block of QUERIES queries sees all up to itself. Of rows that begin alike one owns
   the beginning, and does its queries. */
#include "common.h"

#define QUERIES 24
#define TALL 4 /* rows of a tile of a product; QUERIES and LANES are multiples of it */
#define WIDE (VECTOR_REGISTERS == 32 ? 4 : 3) /* vectors of a tile, so that its sums stay in registers */

/* Once in the program, for all kinds of work: compiling takes its time. */
#define OUTLINE static __attribute__((noinline))

/* TALL rows and `parts` vectors of: out[r][c] (+)= sum over i of left[r * down + i * across] * right[i][c]. What is added
   to is added to last: sums of sums err less than one long sum. */
INLINE void tile(float *out, integer out_stride, const float *left, integer down, integer across, const float *right,
                 integer right_stride, integer inner, int add, const int parts) {
    vector sums[TALL][WIDE];
    for (int row = 0; row < TALL; row++)
        for (int part = 0; part < parts; part++)
            sums[row][part] = (vector){0};
    for (integer i = 0; i < inner; i++)
        for (int row = 0; row < TALL; row++)
            for (int part = 0; part < parts; part++)
                sums[row][part] += left[row * down + i * across] * ((const vector *)(right + i * right_stride))[part];
    for (int row = 0; row < TALL; row++)
        for (int part = 0; part < parts; part++) {
            vector *place = (vector *)(out + row * out_stride) + part;
            if (add) sums[row][part] += *place;
            *place = sums[row][part];
        }
}

/* The whole product; `rows` is a multiple of TALL, `columns` of LANES. */
OUTLINE void multiplied(float *out, integer out_stride, const float *left, integer down, integer across,
                        const float *right, integer right_stride, integer rows, integer inner, integer columns,
                        int add) {
    for (integer column = 0; column < columns; column += WIDE * LANES)
        for (integer row = 0; row < rows; row += TALL) {
            float *found = out + row * out_stride + column;
            const float *one = left + row * down, *other = right + column;
            switch ((columns - column) / LANES) {
            case 1: tile(found, out_stride, one, down, across, other, right_stride, inner, add, 1); break;
            case 2: tile(found, out_stride, one, down, across, other, right_stride, inner, add, 2); break;
            case 3: tile(found, out_stride, one, down, across, other, right_stride, inner, add, 3); break;
            default: tile(found, out_stride, one, down, across, other, right_stride, inner, add, WIDE);
            }
        }
}

typedef struct {
    const void *projected;       /* c [N, (heads + 2 kv_heads) d]: queries, keys and values */
    const float *cos, *sin;      /* [N, d/2] */
    const integer *node, *owner; /* [B x T]: the prefix that ends at a place; [N]: a place of each prefix */
    const void *gradient;        /* backward: c [N, heads d] */
    void *out;                   /* c; forward [N, heads d]; backward as `projected`, whose queries it gets */
    float *shares;               /* backward [B x T, 2, kv_heads, d]: gradients of a place's keys and values */
    float *scratch;              /* [threads, attention_scratch] */
    integer *next;               /* the first item that no thread has taken */
    integer rows, longest, heads, kv_heads, width;
    float scaling;
} attention;

/* A thread's memory: heads of `wide` numbers and `tall` places, rounded up. What lies across has rows `stride` apart, an
   odd number of vectors: at a power of two a cache evicts its own. */
typedef struct {
    integer wide, tall, stride;
    integer along, across, block, scores;                        /* sizes of the four kinds of array */
    float *keys, *values;                                        /* [tall, wide] */
    float *keys_across;                                          /* [wide, stride] */
    float *queries, *found;                                      /* [QUERIES, wide] */
    float *chances;                                              /* [QUERIES, stride] */
    float *of_keys, *of_values, *values_across, *given, *slopes; /* backward: as what they are of */
} room;

static room measured(integer longest, integer width) {
    room r = {0};
    r.wide = up_to(width, LANES), r.tall = up_to(longest, LANES);
    r.stride = (r.tall / LANES | 1) * LANES;
    r.along = r.tall * r.wide, r.across = r.wide * r.stride, r.block = QUERIES * r.wide, r.scores = QUERIES * r.stride;
    return r;
}

/* How many numbers a thread needs. */
integer attention_scratch(integer longest, integer width, int backward) {
    const room r = measured(longest, width);
    return (2 * r.along + r.across + r.block + r.scores) * (backward ? 2 : 1) + r.block;
}

static room furnished(float *scratch, integer longest, integer width, int backward) {
    room r = measured(longest, width);
    r.keys = scratch, scratch += r.along;
    r.values = scratch, scratch += r.along;
    r.keys_across = scratch, scratch += r.across;
    r.queries = scratch, scratch += r.block;
    r.found = scratch, scratch += r.block;
    r.chances = scratch, scratch += r.scores;
    if (!backward) return r;
    r.of_keys = scratch, scratch += r.along;
    r.of_values = scratch, scratch += r.along;
    r.values_across = scratch, scratch += r.across;
    r.given = scratch, scratch += r.block;
    r.slopes = scratch;
    return r;
}

INLINE void fetch_numbers(const attention *a, integer node, integer head, float factor, float *out,
                          const integer width, const int narrow) {
    const integer half = width / 2, every = a->heads + 2 * a->kv_heads;
    const void *x = from(a->projected, (node * every + head) * width, narrow);
    if (head < a->heads + a->kv_heads)
        rotated(x, a->cos + node * half, a->sin + node * half, 1.0f, factor, out, half, narrow);
    else
        widen(x, out, width, narrow);
}

INLINE void fetch_widths(const attention *a, integer node, integer head, float factor, float *out, const int narrow) {
    if (a->width == 64)
        fetch_numbers(a, node, head, factor, out, 64, narrow);
    else if (a->width == 128)
        fetch_numbers(a, node, head, factor, out, 128, narrow);
    else
        fetch_numbers(a, node, head, factor, out, a->width, narrow);
}

/* Number `head` of a prefix's queries, keys and values, in float32; rotated unless it is a value. The loops are written
   out for the common widths. */
OUTLINE void fetch(const attention *a, integer node, integer head, float factor, float *out, int narrow) {
    if (narrow)
        fetch_widths(a, node, head, factor, out, 1);
    else
        fetch_widths(a, node, head, factor, out, 0);
}

OUTLINE void laid_across(const float *along, float *across, const room *r, integer seen) {
    for (integer place = 0; place < seen; place += LANES)
        for (integer i = 0; i < r->wide; i++)
            for (integer lane = 0; lane < LANES; lane++)
                across[i * r->stride + place + lane] = along[(place + lane) * r->wide + i];
}

/* A row's keys and values; zero behind its end and behind a head's numbers. */
INLINE void lay_out_row(const attention *a, const room *r, const integer *node, integer seen, integer head,
                        const int backward, const int narrow) {
    const size_t size = (size_t)(up_to(seen, LANES) * r->wide * 4);
    memset(r->keys, 0, size);
    memset(r->values, 0, size);
    for (integer place = 0; place < seen; place++) {
        fetch(a, node[place], a->heads + head, 1.0f, r->keys + place * r->wide, narrow);
        fetch(a, node[place], a->heads + a->kv_heads + head, 1.0f, r->values + place * r->wide, narrow);
    }
    laid_across(r->keys, r->keys_across, r, seen);
    if (backward) laid_across(r->values, r->values_across, r, seen);
}

INLINE float largest(vector x) {
    float numbers[LANES];
    memcpy(numbers, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            numbers[lane] = numbers[lane + half] > numbers[lane] ? numbers[lane + half] : numbers[lane];
    return numbers[0];
}

/* Products of `count` queries from `first` on with all keys up to them -> probabilities, zero where they see nothing.
   A step for all rows before the next step: a processor then works on several rows at once. */
OUTLINE void soften(float *chances, integer stride, integer first, integer count, integer visible) {
    float most[QUERIES], inverse[QUERIES];
    for (integer row = 0; row < count; row++) {
        float *mine = chances + row * stride;
        const integer seen = first + row + 1, parts = (seen + LANES - 1) / LANES;
        for (integer i = seen; i < parts * LANES; i++) mine[i] = -INFINITY;
        vector highest = *(vector *)mine;
        for (integer part = 1; part < parts; part++)
#pragma omp simd
            for (int lane = 0; lane < LANES; lane++)
                highest[lane] = mine[part * LANES + lane] > highest[lane] ? mine[part * LANES + lane] : highest[lane];
        most[row] = largest(highest);
    }
    for (integer row = 0; row < count; row++) {
        vector total = {0};
        for (integer part = 0; part < (first + row + LANES) / LANES; part++) {
            float *mine = chances + row * stride + part * LANES;
#pragma omp simd
            for (int lane = 0; lane < LANES; lane++) mine[lane] = exponential(mine[lane] - most[row]);
            total += *(vector *)mine;
        }
        inverse[row] = 1.0f / summed(total);
    }
    for (integer row = 0; row < up_to(count, TALL); row++) {
        const integer parts = row < count ? (first + row + LANES) / LANES : 0;
        vector *mine = (vector *)(chances + row * stride);
        for (integer part = 0; part < parts; part++) mine[part] *= inverse[row];
        memset(mine + parts, 0, (size_t)((visible - parts * LANES) * 4));
    }
}

/* Gradients of probabilities -> those of scores, in place; zero where the probabilities are. */
OUTLINE void slope(float *slopes, const float *chances, integer stride, integer count, integer visible) {
    for (integer row = 0; row < up_to(count, TALL); row++) {
        vector *mine = (vector *)(slopes + row * stride), total = {0};
        const vector *chance = (const vector *)(chances + row * stride);
        for (integer part = 0; part < visible / LANES; part++) total += mine[part] * chance[part];
        const float mean = summed(total);
        for (integer part = 0; part < visible / LANES; part++) mine[part] = (mine[part] - mean) * chance[part];
    }
}

/* `count` queries of a head from place `first` of a row on. */
INLINE void attend_block(const attention *a, const room *r, const integer *node, integer first, integer count,
                         integer head, const int backward, const int narrow) {
    const integer wide = r->wide, stride = r->stride, width = a->width, half = width / 2;
    const integer padded = up_to(count, TALL), end = first + count, visible = up_to(end, LANES);
    memset(r->queries, 0, (size_t)(padded * wide * 4));
    for (integer i = 0; i < count; i++) fetch(a, node[first + i], head, a->scaling, r->queries + i * wide, narrow);
    multiplied(r->chances, stride, r->queries, wide, 1, r->keys_across, stride, padded, width, visible, 0);
    soften(r->chances, stride, first, count, visible);
    if (!backward) {
        multiplied(r->found, wide, r->chances, stride, 1, r->values, wide, padded, end, wide, 0);
        for (integer i = 0; i < count; i++)
            store(to(a->out, (node[first + i] * a->heads + head) * width, narrow), r->found + i * wide, width, narrow);
        return;
    }
    memset(r->given, 0, (size_t)(padded * wide * 4));
    for (integer i = 0; i < count; i++)
        widen(from(a->gradient, (node[first + i] * a->heads + head) * width, narrow), r->given + i * wide, width, narrow);
    multiplied(r->slopes, stride, r->given, wide, 1, r->values_across, stride, padded, width, visible, 0);
    slope(r->slopes, r->chances, stride, count, visible);
    multiplied(r->found, wide, r->slopes, stride, 1, r->keys, wide, padded, end, wide, 0);
    multiplied(r->of_keys, wide, r->slopes, 1, stride, r->queries, wide, visible, count, wide, 1);
    multiplied(r->of_values, wide, r->chances, 1, stride, r->given, wide, visible, count, wide, 1);
    for (integer i = 0; i < count; i++) {
        const integer mine = node[first + i], every = a->heads + 2 * a->kv_heads;
        float *found = r->found + i * wide;
        rotated(found, a->cos + mine * half, a->sin + mine * half, -1.0f, a->scaling, found, half, 0);
        store(to(a->out, (mine * every + head) * width, narrow), found, width, narrow);
    }
}

INLINE void attend_item(const attention *a, const room *r, integer item, const int backward, const int narrow) {
    const integer row = item / a->kv_heads, head = item % a->kv_heads, group = a->heads / a->kv_heads;
    const integer start = row * a->longest, *node = a->node + start;
    integer seen = a->longest; /* padding has prefix 0, which ends at a row's first place */
    while (seen > 1 && node[seen - 1] == 0) seen--;
    integer own = seen; /* places from here on this row owns */
    while (own > 0 && a->owner[node[own - 1]] == start + own - 1) own--;
    if (backward) {
        const size_t size = (size_t)(up_to(seen, LANES) * r->wide * 4);
        memset(r->of_keys, 0, size);
        memset(r->of_values, 0, size);
    }
    if (own < seen) lay_out_row(a, r, node, seen, head, backward, narrow);
    for (integer one = head * group; one < (head + 1) * group; one++)
        for (integer first = own; first < seen; first += QUERIES)
            attend_block(a, r, node, first, seen - first < QUERIES ? seen - first : QUERIES, one, backward, narrow);
    if (backward)
        for (integer place = 0; place < seen; place++) {
            float *share = a->shares + ((start + place) * 2 * a->kv_heads + head) * a->width;
            memcpy(share, r->of_keys + place * r->wide, (size_t)(a->width * 4));
            memcpy(share + a->kv_heads * a->width, r->of_values + place * r->wide, (size_t)(a->width * 4));
        }
}

/* Rows differ in length: a thread takes the next item when it has done one. */
INLINE void attend_items(const attention *a, int thread, const int backward, const int narrow) {
    const room r = furnished(a->scratch + thread * attention_scratch(a->longest, a->width, backward), a->longest,
                             a->width, backward);
    integer item;
    while ((item = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED)) < a->rows * a->kv_heads)
        attend_item(a, &r, item, backward, narrow);
}

#define WORK(name, backward, narrow)                                                   \
    static void name(const void *a, integer begin, integer end, int thread) {          \
        (void)begin, (void)end;                                                        \
        attend_items(a, thread, backward, narrow);                                     \
    }
WORK(forward_wide, 0, 0)
WORK(forward_narrow, 0, 1)
WORK(backward_wide, 1, 0)
WORK(backward_narrow, 1, 1)

void attend(const void *projected, const float *cos, const float *sin, const integer *node, const integer *owner,
            void *out, float *scratch, integer rows, integer longest, integer heads, integer kv_heads, integer width,
            float scaling, int narrow, int threads) {
    integer next = 0;
    attention a = {projected, cos, sin, node, owner, 0, out, 0, scratch, &next,
                   rows, longest, heads, kv_heads, width, scaling};
    deal(narrow ? forward_narrow : forward_wide, &a, threads, threads);
}

typedef struct {
    const float *shares, *cos, *sin;
    const integer *holders, *starts; /* the places of prefix n, of 0 also padding: holders[starts[n] .. starts[n + 1]] */
    void *out;                       /* c [N, (heads + 2 kv_heads) d], whose keys and values are written */
    integer longest, heads, kv_heads, width;
} gathering;

/* Gradients of a prefix's keys and values: the sums over its places, in their order. */
INLINE void gather_nodes(const gathering *a, integer begin, integer end, const int narrow) {
    const integer half = a->width / 2, both = 2 * a->kv_heads;
    for (integer node = begin; node < end; node++) {
        for (integer head = 0; head < both; head++) {
            float sum[WIDEST_HEAD];
            for (integer i = 0; i < a->width; i++) sum[i] = 0;
            for (integer holder = a->starts[node]; holder < a->starts[node + 1]; holder++) {
                const integer place = a->holders[holder];
                if (node == 0 && place % a->longest != 0) continue; /* padding */
                const float *share = a->shares + (place * both + head) * a->width;
#pragma omp simd
                for (integer i = 0; i < a->width; i++) sum[i] += share[i];
            }
            if (head < a->kv_heads)
                rotated(sum, a->cos + node * half, a->sin + node * half, -1.0f, 1.0f, sum, half, 0);
            store(to(a->out, (node * (a->heads + both) + a->heads + head) * a->width, narrow), sum, a->width, narrow);
        }
    }
}

static void gather_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gather_nodes(a, begin, end, 0);
}

static void gather_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gather_nodes(a, begin, end, 1);
}

void attend_backward(const void *projected, const float *cos, const float *sin, const integer *node,
                     const integer *owner, const integer *holders, const integer *starts, const void *gradient,
                     void *out, float *shares, float *scratch, integer nodes, integer rows, integer longest,
                     integer heads, integer kv_heads, integer width, float scaling, int narrow, int threads) {
    integer next = 0;
    attention a = {projected, cos, sin, node, owner, gradient, out, shares, scratch, &next,
                   rows, longest, heads, kv_heads, width, scaling};
    deal(narrow ? backward_narrow : backward_wide, &a, threads, threads);
    gathering b = {shares, cos, sin, holders, starts, out, longest, heads, kv_heads, width};
    deal(narrow ? gather_narrow : gather_wide, &b, nodes, threads);
}
