/* Around attention's products: rotation, the layout by heads, the softmax under the causal mask, with their gradients;
   and one query of each row against its slot. Formulas: kernels/attention.py.

   B rows of T places, of which N distinct prefixes are stored once; heads queries and kv_heads keys and values of d
   numbers; the heads / kv_heads = g queries of one key head lie together. */
#include "common.h"

/* Halves (a, b) -> (a cos - b sin, b cos + a sin), `turn` -1 is the inverse. */
INLINE void rotated(const float *x, const float *cos, const float *sin, float turn, float *out, const integer half) {
#pragma omp simd
    for (integer i = 0; i < half; i++) {
        float a = x[i], b = x[half + i], c = cos[i], s = sin[i] * turn;
        out[i] = a * c - b * s;
        out[half + i] = b * c + a * s;
    }
}

INLINE void widen(const void *x, float *out, integer count, const int narrow) {
#pragma omp simd
    for (integer i = 0; i < count; i++) out[i] = get(x, i, narrow);
}

INLINE void store(void *out, const float *x, integer count, const int narrow) {
#pragma omp simd
    for (integer i = 0; i < count; i++) put(out, i, x[i], narrow);
}

typedef struct {
    integer places, longest, heads, kv_heads, width; /* places = B x T */
} shape;

/* Where head `head` of place (b, t) lies among queries [B x kv, g x T, d] (or keys and values, with one query each). */
INLINE integer place_of(const shape *s, integer place, integer head, integer heads) {
    const integer row = place / s->longest, column = place % s->longest;
    return ((row * heads + head) * s->longest + column) * s->width;
}

typedef struct {
    shape s;
    const void *projected;  /* c [N, (heads + 2 kv_heads) d] */
    const float *cos, *sin; /* [N, d/2] */
    const integer *node;    /* [B x T] */
    float *query, *key;     /* [B x kv, g x T, d], [B x kv, T, d] */
    void *narrow_query, *narrow_key; /* the same in bfloat16; not used where c is float32 */
    void *value;            /* c [B x kv, T, d] */
} spreading;

INLINE void spread_places(const spreading *a, integer begin, integer end, const int narrow) {
    const shape *s = &a->s;
    const integer half = s->width / 2, every = s->heads + 2 * s->kv_heads;
    for (integer place = begin; place < end; place++) {
        const integer node = a->node[place];
        const float *cos = a->cos + node * half, *sin = a->sin + node * half;
        float x[WIDEST_HEAD];
        for (integer head = 0; head < s->heads + s->kv_heads; head++) {
            const int is_key = head >= s->heads;
            const integer at = is_key ? place_of(s, place, head - s->heads, s->kv_heads)
                                      : place_of(s, place, head, s->heads);
            float *out = (is_key ? a->key : a->query) + at;
            widen(from(a->projected, (node * every + head) * s->width, narrow), x, s->width, narrow);
            rotated(x, cos, sin, 1.0f, out, half);
            if (narrow) store(to(is_key ? a->narrow_key : a->narrow_query, at, 1), out, s->width, 1);
        }
        for (integer head = 0; head < s->kv_heads; head++)
            memcpy(to(a->value, place_of(s, place, head, s->kv_heads), narrow),
                   from(a->projected, (node * every + s->heads + s->kv_heads + head) * s->width, narrow),
                   (size_t)(s->width * (narrow ? 2 : 4)));
    }
}

static void spread_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    spread_places(a, begin, end, 0);
}

static void spread_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    spread_places(a, begin, end, 1);
}

void spread_heads(const void *projected, const float *cos, const float *sin, const integer *node, float *query,
                  float *key, void *narrow_query, void *narrow_key, void *value, integer places, integer longest,
                  integer heads, integer kv_heads, integer width, int narrow, int threads) {
    spreading a = {{places, longest, heads, kv_heads, width}, projected, cos, sin, node, query, key, narrow_query,
                   narrow_key, value};
    deal(narrow ? spread_narrow : spread_wide, &a, places, threads);
}

typedef struct {
    float *scores; /* [rows, T]; row r sees the first r % T + 1 */
    void *chances; /* c [rows, T] */
    float scaling;
    integer longest;
} masked;

INLINE void soften_rows(const masked *a, integer begin, integer end, const int narrow) {
    const integer longest = a->longest;
    for (integer row = begin; row < end; row++) {
        float *scores = a->scores + row * longest;
        void *chances = to(a->chances, row * longest, narrow);
        const integer seen = row % longest + 1;
        float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
        for (integer i = 0; i < seen; i++) highest = scores[i] > highest ? scores[i] : highest;
#pragma omp simd reduction(+ : total)
        for (integer i = 0; i < seen; i++) {
            float weight = exponential((scores[i] - highest) * a->scaling);
            scores[i] = weight;
            total += weight;
        }
        const float inverse = 1.0f / total;
#pragma omp simd
        for (integer i = 0; i < seen; i++) put(chances, i, scores[i] * inverse, narrow);
        memset(to(chances, seen, narrow), 0, (size_t)((longest - seen) * (narrow ? 2 : 4)));
    }
}

static void soften_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    soften_rows(a, begin, end, 0);
}

static void soften_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    soften_rows(a, begin, end, 1);
}

void causal_softmax(float *scores, void *chances, float scaling, integer rows, integer longest, int narrow,
                    int threads) {
    masked a = {scores, chances, scaling, longest};
    deal(narrow ? soften_narrow : soften_wide, &a, rows, threads);
}

typedef struct {
    const float *of_chances; /* [rows, T] */
    const void *chances;     /* c [rows, T] */
    void *slope;             /* c [rows, T] */
    float scaling;
    integer longest;
} masked_gradient;

INLINE void slope_rows(const masked_gradient *a, integer begin, integer end, const int narrow) {
    const integer longest = a->longest;
    for (integer row = begin; row < end; row++) {
        const float *of = a->of_chances + row * longest;
        const void *chances = from(a->chances, row * longest, narrow);
        void *slope = to(a->slope, row * longest, narrow);
        const integer seen = row % longest + 1;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (integer i = 0; i < seen; i++) mean += of[i] * get(chances, i, narrow);
#pragma omp simd
        for (integer i = 0; i < seen; i++)
            put(slope, i, (of[i] - mean) * get(chances, i, narrow) * a->scaling, narrow);
        memset(to(slope, seen, narrow), 0, (size_t)((longest - seen) * (narrow ? 2 : 4)));
    }
}

static void slope_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    slope_rows(a, begin, end, 0);
}

static void slope_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    slope_rows(a, begin, end, 1);
}

void causal_softmax_backward(const float *of_chances, const void *chances, void *slope, float scaling, integer rows,
                             integer longest, int narrow, int threads) {
    masked_gradient a = {of_chances, chances, slope, scaling, longest};
    deal(narrow ? slope_narrow : slope_wide, &a, rows, threads);
}

typedef struct {
    shape s;
    const void *attended; /* c [B x kv, g x T, d] */
    const integer *owner; /* [N]: a place of each node */
    void *out;            /* c [N, heads d] */
    int narrow;
} joining;

static void join_nodes(const void *given, integer begin, integer end, int thread) {
    (void)thread;
    const joining *a = given;
    const shape *s = &a->s;
    for (integer node = begin; node < end; node++)
        for (integer head = 0; head < s->heads; head++)
            memcpy(to(a->out, (node * s->heads + head) * s->width, a->narrow),
                   from(a->attended, place_of(s, a->owner[node], head, s->heads), a->narrow),
                   (size_t)(s->width * (a->narrow ? 2 : 4)));
}

void join_heads(const void *attended, const integer *owner, void *out, integer nodes, integer places, integer longest,
                integer heads, integer kv_heads, integer width, int narrow, int threads) {
    joining a = {{places, longest, heads, kv_heads, width}, attended, owner, out, narrow};
    deal(join_nodes, &a, nodes, threads);
}

typedef struct {
    shape s;
    const void *gradient; /* c [N, heads d] */
    const integer *node, *owner;
    float *wide; /* [B x kv, g x T, d] */
    void *own;   /* the same in bfloat16; not used where c is float32 */
} parting;

INLINE void part_places(const parting *a, integer begin, integer end, const int narrow) {
    const shape *s = &a->s;
    for (integer place = begin; place < end; place++) {
        const integer node = a->node[place];
        const int owned = a->owner[node] == place; /* a shared position is attended from once */
        for (integer head = 0; head < s->heads; head++) {
            const integer at = place_of(s, place, head, s->heads);
            const void *given = from(a->gradient, (node * s->heads + head) * s->width, narrow);
            if (owned)
                widen(given, a->wide + at, s->width, narrow);
            else
                memset(a->wide + at, 0, (size_t)(s->width * 4));
            if (narrow && owned) memcpy(to(a->own, at, 1), given, (size_t)(s->width * 2));
            if (narrow && !owned) memset(to(a->own, at, 1), 0, (size_t)(s->width * 2));
        }
    }
}

static void part_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    part_places(a, begin, end, 0);
}

static void part_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    part_places(a, begin, end, 1);
}

void join_heads_backward(const void *gradient, const integer *node, const integer *owner, float *wide, void *own,
                         integer places, integer longest, integer heads, integer kv_heads, integer width, int narrow,
                         int threads) {
    parting a = {{places, longest, heads, kv_heads, width}, gradient, node, owner, wide, own};
    deal(narrow ? part_narrow : part_wide, &a, places, threads);
}

typedef struct {
    shape s;
    const void *of_query, *of_key, *of_value; /* c, as spread_heads laid them out */
    const float *cos, *sin;
    const integer *holders, *starts; /* the places that share node n are holders[starts[n] .. starts[n + 1]] */
    void *out;                       /* c [N, (heads + 2 kv_heads) d] */
} collecting;

INLINE void collect_nodes(const collecting *a, integer begin, integer end, const int narrow) {
    const shape *s = &a->s;
    const integer half = s->width / 2, every = s->heads + 2 * s->kv_heads;
    for (integer node = begin; node < end; node++)
        for (integer head = 0; head < every; head++) {
            const int is_query = head < s->heads, is_value = head >= s->heads + s->kv_heads;
            const void *source = is_query ? a->of_query : is_value ? a->of_value : a->of_key;
            const integer number = is_query ? head : is_value ? head - s->heads - s->kv_heads : head - s->heads;
            const integer all = is_query ? s->heads : s->kv_heads;
            float sum[WIDEST_HEAD], out[WIDEST_HEAD];
            for (integer i = 0; i < s->width; i++) sum[i] = 0;
            for (integer holder = a->starts[node]; holder < a->starts[node + 1]; holder++) {
                const void *one = from(source, place_of(s, a->holders[holder], number, all), narrow);
#pragma omp simd
                for (integer i = 0; i < s->width; i++) sum[i] += get(one, i, narrow);
            }
            if (!is_value) rotated(sum, a->cos + node * half, a->sin + node * half, -1.0f, out, half);
            store(to(a->out, (node * every + head) * s->width, narrow), is_value ? sum : out, s->width, narrow);
        }
}

static void collect_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    collect_nodes(a, begin, end, 0);
}

static void collect_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    collect_nodes(a, begin, end, 1);
}

void spread_heads_backward(const void *of_query, const void *of_key, const void *of_value, const float *cos,
                           const float *sin, const integer *holders, const integer *starts, void *out, integer nodes,
                           integer places, integer longest, integer heads, integer kv_heads, integer width, int narrow,
                           int threads) {
    collecting a = {{places, longest, heads, kv_heads, width}, of_query, of_key, of_value, cos, sin, holders, starts,
                    out};
    deal(narrow ? collect_narrow : collect_wide, &a, nodes, threads);
}
