/* What the kernels share: numbers of two types, an exponential that vectorises, and work dealt out to torch's threads.

   A tensor of the compute type c is float32 or bfloat16 as a flag `narrow` says; inner functions take the flag as a
   constant, so that each type has loops of its own. Sums are float32 or wider. */
#ifndef MRLM_COMMON_H
#define MRLM_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int64_t integer;

INLINE integer at_most(integer number, integer most) { return number < most ? number : most; }

INLINE integer up_to(integer count, integer unit) { return (count + unit - 1) / unit * unit; }

/* Sizes that callers must know too; deal.c exports them. */
#define WIDEST_HEAD 256 /* numbers of an attention head that there is room for */
#if defined(__AVX512F__)
#define LANES 16 /* of which a processor's vector holds so many */
#define VECTOR_REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define LANES 4
#define VECTOR_REGISTERS 32
#else
#define LANES 4
#define VECTOR_REGISTERS 16
#endif
#define TOGETHER 3 /* queries that share the reading of a key in a decoding step */

/* Of more than the processor has, compilers make many small moves. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The sum of a vector's numbers. */
INLINE float summed(vector x) {
    typedef float four __attribute__((vector_size(16)));
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    union { vector whole; eight half[2]; } first = {x};
    union { eight whole; four half[2]; } second = {first.half[0] + first.half[1]};
    const four rest = second.half[0] + second.half[1];
#elif LANES == 8
    union { vector whole; four half[2]; } first = {x};
    const four rest = first.half[0] + first.half[1];
#else
    const four rest = x;
#endif
    return (rest[0] + rest[1]) + (rest[2] + rest[3]);
}

INLINE float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &wide, 4);
    return number;
}

/* Rounds to the nearest bfloat16, ties to even, as torch does; a NaN stays one. */
INLINE uint16_t narrowed(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

INLINE float get(const void *numbers, integer index, const int narrow) {
    return narrow ? widened(((const uint16_t *)numbers)[index]) : ((const float *)numbers)[index];
}

INLINE void put(void *numbers, integer index, float number, const int narrow) {
    if (narrow)
        ((uint16_t *)numbers)[index] = narrowed(number);
    else
        ((float *)numbers)[index] = number;
}

/* `count` numbers of type c in float32, and back. */
INLINE void widen(const void *x, float *out, integer count, const int narrow) {
#pragma omp simd
    for (integer i = 0; i < count; i++) out[i] = get(x, i, narrow);
}

INLINE void store(void *out, const float *x, integer count, const int narrow) {
#pragma omp simd
    for (integer i = 0; i < count; i++) put(out, i, x[i], narrow);
}

/* Where item `index` of an array of type c lies. */
INLINE const void *from(const void *numbers, integer index, const int narrow) {
    return (const char *)numbers + index * (narrow ? 2 : 4);
}

INLINE void *to(void *numbers, integer index, const int narrow) {
    return (char *)numbers + index * (narrow ? 2 : 4);
}

/* e^x within 2 units in the last place of float32 for x <= 88, and that of 88 above; 0 below -87.3, near which float32's
   normal numbers end; NaN of NaN. Range reduction by ln 2 in two parts (Cody & Waite 1980) and the Taylor polynomial of degree 7. */
INLINE float exponential(float x) {
    float bounded = x > 88.0f ? 88.0f : x;
    float times = __builtin_rintf((bounded > -88.0f ? bounded : -88.0f) * 1.44269504089f); /* a number, of NaN too */
    float rest = bounded - times * 0.693359375f + times * 2.12194440054e-4f;
    float sum = 1.0f / 5040.0f;
    sum = sum * rest + 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    int32_t exponent = ((int32_t)times + 127) * (1 << 23);
    float power;
    memcpy(&power, &exponent, 4);
    return x < -87.3f ? 0.0f : sum * power;
}

INLINE float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

/* Halves (a, b) of 2 `half` numbers of type c -> (a cos - b sin, b cos + a sin) times `factor`, in float32; `turn` -1 is
   the inverse. `out` may be x itself. */
INLINE void rotated(const void *x, const float *cos, const float *sin, float turn, float factor, float *out,
                    const integer half, const int narrow) {
#pragma omp simd
    for (integer i = 0; i < half; i++) {
        const float a = get(x, i, narrow), b = get(x, half + i, narrow), c = cos[i] * factor, s = sin[i] * turn * factor;
        out[i] = a * c - b * s;
        out[half + i] = b * c + a * s;
    }
}

/* Does items begin..end of a piece of work; `thread` counts from 0. */
typedef void (*work)(const void *arguments, integer begin, integer end, int thread);

/* Deals `count` items out evenly, in order, to at most `threads` threads of torch's own pool. */
__attribute__((visibility("hidden"))) void deal(work each, const void *arguments, integer count, int threads);

#endif
