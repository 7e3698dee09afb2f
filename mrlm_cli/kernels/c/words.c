/* Over the words of a vocabulary: log-probs and entropies with their gradients, and the sampler. Formulas:
   kernels/logprobs.py and engines/sampler.py. */
#include "common.h"

#define BLOCK 1024 /* words whose sums are float32; sums of these are float64 */
#define NOTHING -100.0f /* log-probs are bounded here where they multiply a probability, which is 0 long before */

typedef struct {
    const void *logits; /* c [rows, words] */
    const integer *targets;
    float temperature;
    float *logprobs, *log_total, *entropies; /* [rows]; entropies NULL: not wanted */
    integer words;
} scores;

/* The largest of the numbers; NaN are passed over. */
INLINE float largest(const void *numbers, integer count, const int narrow) {
    float found = -INFINITY;
#pragma omp simd reduction(max : found)
    for (integer i = 0; i < count; i++) {
        float number = get(numbers, i, narrow);
        found = number > found ? number : found;
    }
    return found;
}

INLINE void score_rows(const scores *a, integer begin, integer end, const int narrow) {
    for (integer row = begin; row < end; row++) {
        const void *logits = from(a->logits, row * a->words, narrow);
        const float inverse = 1.0f / a->temperature, highest = largest(logits, a->words, narrow) * inverse;
        double total = 0, moment = 0;
        for (integer start = 0; start < a->words; start += BLOCK) {
            const integer stop = start + BLOCK < a->words ? start + BLOCK : a->words;
            float sum = 0, weighted = 0;
            if (a->entropies) {
#pragma omp simd reduction(+ : sum, weighted)
                for (integer i = start; i < stop; i++) {
                    float z = get(logits, i, narrow) * inverse - highest, weight = exponential(z);
                    sum += weight;
                    /* 0 * log 0 is 0, not NaN; a NaN stays one. */
                    weighted += weight * (z < NOTHING ? NOTHING : z);
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (integer i = start; i < stop; i++) sum += exponential(get(logits, i, narrow) * inverse - highest);
            }
            total += sum;
            moment += weighted;
        }
        const double log_total = log(total);
        a->logprobs[row] = (float)(get(logits, a->targets[row], narrow) * inverse - highest - log_total);
        a->log_total[row] = (float)(highest + log_total);
        if (a->entropies) a->entropies[row] = (float)(log_total - moment / total);
    }
}

static void score_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    score_rows(a, begin, end, 0);
}

static void score_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    score_rows(a, begin, end, 1);
}

void score(const void *logits, const integer *targets, float temperature, float *logprobs, float *log_total,
           float *entropies, integer rows, integer words, int narrow, int threads) {
    scores a = {logits, targets, temperature, logprobs, log_total, entropies, words};
    deal(narrow ? score_narrow : score_wide, &a, rows, threads);
}

typedef struct {
    const void *logits; /* c [rows, words] */
    const integer *targets;
    float temperature;
    const float *log_total, *entropies, *of_logprobs, *of_entropies; /* [rows]; of_entropies NULL: zeros */
    void *out; /* c [rows, words] */
    integer words;
} score_gradient;

INLINE void score_gradient_rows(const score_gradient *a, integer begin, integer end, const int narrow) {
    const integer words = a->words;
    for (integer row = begin; row < end; row++) {
        const void *logits = from(a->logits, row * words, narrow);
        void *out = to(a->out, row * words, narrow);
        const float inverse = 1.0f / a->temperature, log_total = a->log_total[row], of_logprob = a->of_logprobs[row];
        const integer target = a->targets[row];
        float at_target = get(logits, target, narrow) * inverse - log_total;
        if (a->of_entropies) {
            const float of_entropy = a->of_entropies[row], entropy = a->entropies[row];
#pragma omp simd
            for (integer i = 0; i < words; i++) {
                float z = get(logits, i, narrow) * inverse - log_total, p = exponential(z);
                float bounded = z < NOTHING ? NOTHING : z;
                put(out, i, -p * (of_logprob + of_entropy * (bounded + entropy)) * inverse, narrow);
            }
            float bounded = at_target < NOTHING ? NOTHING : at_target;
            at_target = of_logprob - exponential(at_target) * (of_logprob + of_entropy * (bounded + entropy));
        } else {
#pragma omp simd
            for (integer i = 0; i < words; i++)
                put(out, i, -exponential(get(logits, i, narrow) * inverse - log_total) * of_logprob * inverse, narrow);
            at_target = of_logprob - exponential(at_target) * of_logprob;
        }
        put(out, target, at_target * inverse, narrow);
    }
}

static void score_gradient_wide(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    score_gradient_rows(a, begin, end, 0);
}

static void score_gradient_narrow(const void *a, integer begin, integer end, int thread) {
    (void)thread;
    score_gradient_rows(a, begin, end, 1);
}

void score_backward(const void *logits, const integer *targets, float temperature, const float *log_total,
                    const float *entropies, const float *of_logprobs, const float *of_entropies, void *out,
                    integer rows, integer words, int narrow, int threads) {
    score_gradient a = {logits, targets, temperature, log_total, entropies, of_logprobs, of_entropies, out, words};
    deal(narrow ? score_gradient_narrow : score_gradient_wide, &a, rows, threads);
}

typedef struct {
    const void *logits;       /* c [rows, words] */
    const float *temperature; /* [rows]; 0: greedy */
    const double *uniforms;   /* [rows, 2] */
    integer *tokens;          /* [rows] */
    float *logprobs;          /* [rows] */
    double *masses;           /* [threads, size]: no more blocks than words in one */
    integer words, size, blocks;
} draws;

/* First of `count` positive masses whose running sum exceeds part * the whole sum; 0 if none does. */
static integer inverted(const double *masses, integer count, double part) {
    double whole = 0, sum = 0;
    for (integer i = 0; i < count; i++) whole += masses[i];
    const double limit = part * whole;
    for (integer i = 0; i < count; i++) {
        sum += masses[i];
        if (masses[i] > 0 && sum > limit) return i;
    }
    return 0;
}

INLINE void draw_rows(const draws *a, integer begin, integer end, int thread, const int narrow) {
    double *masses = a->masses + thread * a->size;
    for (integer row = begin; row < end; row++) {
        const void *logits = from(a->logits, row * a->words, narrow);
        const float temperature = a->temperature[row], inverse = temperature == 0 ? 1.0f : 1.0f / temperature;
        const float highest = largest(logits, a->words, narrow) * inverse;
        double total = 0;
        for (integer block = 0; block < a->blocks; block++) {
            const integer start = block * a->size;
            const integer stop = start + a->size < a->words ? start + a->size : a->words;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (integer i = start; i < stop; i++)
                sum += (double)exponential(get(logits, i, narrow) * inverse - highest);
            masses[block] = sum;
            total += sum;
        }
        integer token = 0;
        if (temperature == 0) {
            while (token < a->words - 1 && !(get(logits, token, narrow) >= highest)) token++;
        } else {
            const integer start = inverted(masses, a->blocks, a->uniforms[2 * row]) * a->size;
            const integer count = start + a->size < a->words ? a->size : a->words - start;
            for (integer i = 0; i < count; i++)
                masses[i] = exponential(get(logits, start + i, narrow) * inverse - highest);
            token = start + inverted(masses, count, a->uniforms[2 * row + 1]);
        }
        a->tokens[row] = token;
        a->logprobs[row] = (float)((double)(get(logits, token, narrow) * inverse - highest) - log(total));
    }
}

static void draw_wide(const void *a, integer begin, integer end, int thread) { draw_rows(a, begin, end, thread, 0); }

static void draw_narrow(const void *a, integer begin, integer end, int thread) { draw_rows(a, begin, end, thread, 1); }

void draw(const void *logits, const float *temperature, const double *uniforms, integer *tokens, float *logprobs,
          double *masses, integer rows, integer words, integer size, int narrow, int threads) {
    draws a = {logits, temperature, uniforms, tokens, logprobs, masses, words, size, (words + size - 1) / size};
    deal(narrow ? draw_narrow : draw_wide, &a, rows, threads);
}
