#include "common.h"

/* Sizes that callers must know. */
const integer widest_head = WIDEST_HEAD, lanes = LANES, together = TOGETHER;

/* torch's OpenMP runtime: a second one would have threads of its own, which spin against torch's. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);
static int (*thread_count)(void);

typedef struct {
    work each;
    const void *arguments;
    integer count, limit;
} share;

void use_threads(void *run, void *number, void *count) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
}

static void take(void *given) {
    const share *all = given;
    integer number = thread_number(), threads = thread_count();
    if (threads > all->limit) threads = all->limit;
    if (number >= threads) return;
    all->each(all->arguments, all->count * number / threads, all->count * (number + 1) / threads, (int)number);
}

void deal(work each, const void *arguments, integer count, int threads) {
    share all = {each, arguments, count, threads};
    if (threads > 1)
        parallel(take, &all, 0, 0); /* always the whole team: runtimes end the threads that a smaller one leaves over */
    else
        each(arguments, 0, count, 0);
}
