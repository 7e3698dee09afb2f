/* What lies between two products of a layer: RMSNorm and SwiGLU, forward and backward. Formulas: kernels/between.py. */
#include "common.h"

typedef struct {
    float *x;           /* [rows, width] */
    const void *addend; /* c [rows, width]: added to x first, in place; NULL: nothing is */
    const float *gain;  /* [width] */
    float eps;
    void *out;    /* c [rows, width] */
    float *scale; /* [rows]: reciprocal roots; NULL: not wanted */
    integer width;
} norm;

INLINE void norm_rows(const norm *a, integer begin, integer end, const int narrow) {
    const integer width = a->width;
    for (integer row = begin; row < end; row++) {
        float *x = a->x + row * width;
        const float *gain = a->gain;
        float squares = 0;
        if (a->addend) {
            const void *addend = from(a->addend, row * width, narrow);
#pragma omp simd reduction(+ : squares)
            for (integer i = 0; i < width; i++) {
                float sum = x[i] + get(addend, i, narrow);
                x[i] = sum;
                squares += sum * sum;
            }
        } else {
#pragma omp simd reduction(+ : squares)
            for (integer i = 0; i < width; i++) squares += x[i] * x[i];
        }
        const float scale = 1.0f / sqrtf(squares / (float)width + a->eps);
        void *out = to(a->out, row * width, narrow);
#pragma omp simd
        for (integer i = 0; i < width; i++) put(out, i, x[i] * scale * gain[i], narrow);
        if (a->scale) a->scale[row] = scale;
    }
}

static void norm_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    norm_rows(a, begin, end, 0);
}

static void norm_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    norm_rows(a, begin, end, 1);
}

void rms_norm(float *x, const void *addend, const float *gain, float eps, void *out, float *scale, integer rows,
              integer width, int narrow, int threads) {
    norm a = {x, addend, gain, eps, out, scale, width};
    deal(narrow ? norm_narrow : norm_wide, &a, rows, threads);
}

typedef struct {
    const void *of_y;    /* c [rows, width] */
    const void *besides; /* c [rows, width]: added to of_y; NULL: nothing is */
    const float *x;      /* [rows, width] */
    const float *gain;   /* [width] */
    const float *scale;  /* [rows] */
    float *of_x;         /* [rows, width] */
    float *of_gain;      /* [threads, width], zeros */
    void *y;             /* c [rows, width]: made again; NULL: not wanted */
    integer width;
} norm_gradient;

INLINE void norm_gradient_rows(const norm_gradient *a, integer begin, integer end, int thread, const int narrow) {
    const integer width = a->width;
    float *of_gain = a->of_gain + thread * width;
    for (integer row = begin; row < end; row++) {
        const float *x = a->x + row * width, *gain = a->gain;
        const float scale = a->scale[row];
        const void *of_y = from(a->of_y, row * width, narrow);
        const void *besides = a->besides ? from(a->besides, row * width, narrow) : 0;
        float *of_x = a->of_x + row * width;
        float dot = 0;
        if (besides) {
#pragma omp simd
            for (integer i = 0; i < width; i++) of_x[i] = get(of_y, i, narrow) + get(besides, i, narrow);
        } else {
#pragma omp simd
            for (integer i = 0; i < width; i++) of_x[i] = get(of_y, i, narrow);
        }
#pragma omp simd reduction(+ : dot)
        for (integer i = 0; i < width; i++) {
            float unit = x[i] * scale, of_unit = of_x[i] * gain[i];
            of_gain[i] += of_x[i] * unit;
            of_x[i] = of_unit;
            dot += of_unit * unit;
        }
        const float mean = dot / (float)width;
#pragma omp simd
        for (integer i = 0; i < width; i++) of_x[i] = (of_x[i] - x[i] * scale * mean) * scale;
        if (a->y) {
            void *y = to(a->y, row * width, narrow);
#pragma omp simd
            for (integer i = 0; i < width; i++) put(y, i, x[i] * scale * gain[i], narrow);
        }
    }
}

static void norm_gradient_wide(const void *a, integer begin, integer end, int thread) {
    norm_gradient_rows(a, begin, end, thread, 0);
}

static void norm_gradient_narrow(const void *a, integer begin, integer end, int thread) {
    norm_gradient_rows(a, begin, end, thread, 1);
}

void rms_norm_backward(const void *of_y, const void *besides, const float *x, const float *gain, const float *scale,
                       float *of_x, float *of_gain, void *y, integer rows, integer width, int narrow, int threads) {
    norm_gradient a = {of_y, besides, x, gain, scale, of_x, of_gain, y, width};
    deal(narrow ? norm_gradient_narrow : norm_gradient_wide, &a, rows, threads);
}

typedef struct {
    const void *both; /* c [rows, 2 * width] */
    void *y;          /* c [rows, width]; NULL in the backward pass: not wanted */
    const void *of_y; /* c [rows, width] */
    const void *besides;
    void *of_both; /* c [rows, 2 * width] */
    integer width;
} gates;

INLINE void gate_rows(const gates *a, integer begin, integer end, const int narrow) {
    const integer width = a->width;
    for (integer row = begin; row < end; row++) {
        const void *gate = from(a->both, 2 * row * width, narrow), *up = from(gate, width, narrow);
        void *y = to(a->y, row * width, narrow);
#pragma omp simd
        for (integer i = 0; i < width; i++) {
            float z = get(gate, i, narrow);
            put(y, i, z * sigmoid(z) * get(up, i, narrow), narrow);
        }
    }
}

static void gate_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gate_rows(a, begin, end, 0);
}

static void gate_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gate_rows(a, begin, end, 1);
}

void swiglu(const void *both, void *y, integer rows, integer width, int narrow, int threads) {
    gates a = {both, y, 0, 0, 0, width};
    deal(narrow ? gate_narrow : gate_wide, &a, rows, threads);
}

INLINE void gate_gradient_rows(const gates *a, integer begin, integer end, const int narrow, const int more,
                               const int again) {
    const integer width = a->width;
    for (integer row = begin; row < end; row++) {
        const void *gate = from(a->both, 2 * row * width, narrow), *up = from(gate, width, narrow);
        const void *of_y = from(a->of_y, row * width, narrow);
        const void *besides = more ? from(a->besides, row * width, narrow) : 0;
        void *of_gate = to(a->of_both, 2 * row * width, narrow), *of_up = to(of_gate, width, narrow);
        void *y = again ? to(a->y, row * width, narrow) : 0;
#pragma omp simd
        for (integer i = 0; i < width; i++) {
            float z = get(gate, i, narrow), u = get(up, i, narrow), of = get(of_y, i, narrow);
            if (more) of += get(besides, i, narrow);
            float part = sigmoid(z), silu = z * part;
            put(of_up, i, of * silu, narrow);
            put(of_gate, i, of * u * part * (1.0f + z - silu), narrow);
            if (again) put(y, i, silu * u, narrow);
        }
    }
}

INLINE void gate_gradient(const gates *a, integer begin, integer end, const int narrow) {
    if (a->besides && a->y)
        gate_gradient_rows(a, begin, end, narrow, 1, 1);
    else if (a->besides)
        gate_gradient_rows(a, begin, end, narrow, 1, 0);
    else if (a->y)
        gate_gradient_rows(a, begin, end, narrow, 0, 1);
    else
        gate_gradient_rows(a, begin, end, narrow, 0, 0);
}

static void gate_gradient_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gate_gradient(a, begin, end, 0);
}

static void gate_gradient_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    gate_gradient(a, begin, end, 1);
}

void swiglu_backward(const void *of_y, const void *besides, const void *both, void *of_both, void *y, integer rows,
                     integer width, int narrow, int threads) {
    gates a = {both, y, of_y, besides, of_both, width};
    deal(narrow ? gate_gradient_narrow : gate_gradient_wide, &a, rows, threads);
}
