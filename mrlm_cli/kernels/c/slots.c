/* A decoding step's attention: one query of each row against the keys and values of its slot. */
#include "common.h"

typedef struct {
    const void *projected;  /* c [rows, (heads + 2 kv_heads) d] */
    const float *cos, *sin; /* [rows, d/2] */
    float *keys, *values;   /* [slots, kv_heads, capacity, d]: row r has slot r */
    const integer *positions; /* [rows]: where the new key and value go; earlier ones are attended to */
    void *out;              /* c [rows, heads d] */
    float *scratch;         /* [threads, TOGETHER, capacity] */
    integer heads, kv_heads, width, capacity;
    float scaling;
} step;

/* scores[i][t] = query i . key t; what is `next` is fetched meanwhile. */
INLINE void dots(const float *query, const float *keys, const float *next, float *scores, integer stride, integer seen,
                 const integer width, const int count) {
    const integer parts = width / LANES;
    for (integer t = 0; t < seen; t++) {
        const vector *key = (const vector *)(keys + t * width);
        vector sums[TOGETHER];
        for (integer part = 0; part < parts; part++) __builtin_prefetch(next + t * width + part * LANES);
        for (int i = 0; i < count; i++) sums[i] = ((const vector *)(query + i * width))[0] * key[0];
        for (integer part = 1; part < parts; part++)
            for (int i = 0; i < count; i++) sums[i] += ((const vector *)(query + i * width))[part] * key[part];
        for (int i = 0; i < count; i++) scores[i * stride + t] = summed(sums[i]);
    }
}

/* out[i] = sum over t of chances[i][t] * value t. */
INLINE void mixed(const float *chances, integer stride, const float *values, const float *next, float *out,
                  integer seen, const integer width, const int count) {
    const integer most = VECTOR_REGISTERS / 4; /* so that sums stay in registers */
    for (integer start = 0; start < width / LANES; start += most) {
        const integer left = width / LANES - start, parts = left < most ? left : most;
        vector sums[TOGETHER][VECTOR_REGISTERS / 4];
        for (int i = 0; i < count; i++)
            for (integer part = 0; part < parts; part++) sums[i][part] = (vector){0};
        for (integer t = 0; t < seen; t++) {
            const vector *value = (const vector *)(values + t * width) + start;
            for (integer part = 0; part < parts; part++) __builtin_prefetch(next + t * width + (start + part) * LANES);
            for (integer part = 0; part < parts; part++)
                for (int i = 0; i < count; i++) sums[i][part] += chances[i * stride + t] * value[part];
        }
        for (int i = 0; i < count; i++)
            for (integer part = 0; part < parts; part++)
                *(vector *)(out + i * width + (start + part) * LANES) = sums[i][part];
    }
}

static void soften(float *scores, integer seen) {
    float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
    for (integer t = 0; t < seen; t++) highest = scores[t] > highest ? scores[t] : highest;
#pragma omp simd reduction(+ : total)
    for (integer t = 0; t < seen; t++) {
        scores[t] = exponential(scores[t] - highest);
        total += scores[t];
    }
    const float inverse = 1.0f / total;
#pragma omp simd
    for (integer t = 0; t < seen; t++) scores[t] *= inverse;
}

/* `count` queries of one key head. */
INLINE void attend(const float *query, const float *keys, const float *values, const float *next, float *scores,
                   float *out, integer stride, integer seen, const integer width, const int count) {
    dots(query, keys, values, scores, stride, seen, width, count);
    for (int i = 0; i < count; i++) soften(scores + i * stride, seen);
    mixed(scores, stride, values, next, out, seen, width, count);
}

INLINE void step_heads(const step *a, integer begin, integer end, int thread, const integer width, const int narrow) {
    const integer group = a->heads / a->kv_heads, every = a->heads + 2 * a->kv_heads;
    float *scores = a->scratch + thread * TOGETHER * a->capacity;
    for (integer item = begin; item < end; item++) {
        const integer row = item / a->kv_heads, head = item % a->kv_heads;
        const integer position = a->positions[row];
        float *keys = a->keys + item * a->capacity * width, *values = a->values + item * a->capacity * width;
        const float *next = item + 1 < end ? keys + a->capacity * width : keys;
        const float *cos = a->cos + row * (width / 2), *sin = a->sin + row * (width / 2);
        const void *projected = from(a->projected, row * every * width, narrow);
        rotated(from(projected, (a->heads + head) * width, narrow), cos, sin, 1.0f, 1.0f, keys + position * width,
                width / 2, narrow);
        const void *value = from(projected, (a->heads + a->kv_heads + head) * width, narrow);
        widen(value, values + position * width, width, narrow);
        for (integer first = 0; first < group; first += TOGETHER) {
            const int count = group - first < TOGETHER ? (int)(group - first) : TOGETHER;
            float query[TOGETHER * WIDEST_HEAD], out[TOGETHER * WIDEST_HEAD];
            for (int i = 0; i < count; i++)
                rotated(from(projected, (head * group + first + i) * width, narrow), cos, sin, 1.0f, a->scaling,
                        query + i * width, width / 2, narrow);
            const float *then = first + TOGETHER < group ? keys : next;
            if (count == 1)
                attend(query, keys, values, then, scores, out, a->capacity, position + 1, width, 1);
            else if (count == 2)
                attend(query, keys, values, then, scores, out, a->capacity, position + 1, width, 2);
            else
                attend(query, keys, values, then, scores, out, a->capacity, position + 1, width, 3);
            store(to(a->out, (row * a->heads + head * group + first) * width, narrow), out, count * width, narrow);
        }
    }
}

/* Loops over a head's numbers are written out for the common widths. */
INLINE void step_widths(const step *a, integer begin, integer end, int thread, const int narrow) {
    if (a->width == 64)
        step_heads(a, begin, end, thread, 64, narrow);
    else if (a->width == 128)
        step_heads(a, begin, end, thread, 128, narrow);
    else if (a->width == 32)
        step_heads(a, begin, end, thread, 32, narrow);
    else
        step_heads(a, begin, end, thread, a->width, narrow);
}

static void step_wide(const void *a, integer begin, integer end, int thread) {
    step_widths(a, begin, end, thread, 0);
}

static void step_narrow(const void *a, integer begin, integer end, int thread) {
    step_widths(a, begin, end, thread, 1);
}

void attend_slots(const void *projected, const float *cos, const float *sin, float *keys, float *values,
                  const integer *positions, void *out, float *scratch, integer rows, integer heads, integer kv_heads,
                  integer width, integer capacity, float scaling, int narrow, int threads) {
    step a = {projected, cos, sin, keys, values, positions, out, scratch, heads, kv_heads, width, capacity, scaling};
    deal(narrow ? step_narrow : step_wide, &a, rows * kv_heads, threads);
}
