/* Passes over rows of logits: what torch does in a dozen passes over memory, in two.
 *
 * Plain C, made fast by the compiler: loops without branches over a tile of the vocabulary, which it
 * turns into vector instructions, in one copy for each kind of x86-64; the loader of the dynamic
 * linker picks the copy. Rows go to the threads of torch's own OpenMP. `drafts/passes.py` has the
 * interface, the units and what it does where this was not built.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PASS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PASS
#endif
#define INLINE static inline __attribute__((always_inline))

enum { TILE = 512, BLOCK = 32, MAX_DRAFTS = 64 };

/* The least log-prob that counts, of the smallest normal float: see drafts/divergence.py. */
static const float FLOOR = -87.33654f;
static const float CEILING = 80.0f; /* V times its exponential is a float still */

/* e^x for x in [-87.33, 88], to 2 units in the last place: 2^n times a polynomial. NaN is NaN. */
INLINE float exp_of(float x) {
    const float big = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    float shifted = x * 1.44269504f + big;
    float n = shifted - big;
    float r = x - n * 0.693147182f;
    float p = 8.290305451e-03f;
    p = p * r + 4.189797571e-02f;
    p = p * r + 1.666763659e-01f;
    p = p * r + 4.999914919e-01f;
    p = p * r + 9.999997070e-01f;
    p = p * r + 1.0f;
    /* The low bits of `shifted` are n: they go to the exponent. */
    int32_t power, bits;
    memcpy(&power, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits = (int32_t)((uint32_t)bits + ((uint32_t)power << 23));
    memcpy(&p, &bits, 4);
    return p;
}

/* ln x for normal x > 0 (Cephes' logf, without its branches). */
INLINE float log_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    /* x = 2^n m with m in [sqrt(1/2), sqrt(2)) */
    int32_t moved = bits - 0x3F3504F3;
    float n = (float)(moved >> 23);
    int32_t rest = (moved & 0x007FFFFF) + 0x3F3504F3;
    float m;
    memcpy(&m, &rest, 4);
    m -= 1.0f;
    float z = m * m;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + n * -2.12194440e-4f - 0.5f * z;
    return m + y + n * 0.693359375f;
}

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* A row's part of a tile as float32. */
INLINE void read_tile(const void *row, int is_half, int64_t start, int n, float *out) {
    if (is_half) {
        const uint16_t *half = (const uint16_t *)row + start;
        for (int i = 0; i < n; i++) out[i] = widen(half[i]);
    } else {
        memcpy(out, (const float *)row + start, sizeof(float) * n);
    }
}

INLINE const void *row_of(const void *rows, int is_half, int64_t stride, int64_t t) {
    return (const char *)rows + t * stride * (is_half ? 2 : 4);
}

/* Reorder so that the c greatest come first (Hoare's selection); returns the least of them. */
static float select_greatest(float *x, int n, int c) {
    int low = 0, high = n - 1;
    while (low < high) {
        float pivot = x[(low + high) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (c - 1 <= j) high = j;
        else if (c - 1 >= i) low = i;
        else break;
    }
    return x[c - 1];
}

/* The c likeliest tokens of a row, by id; of those as likely as the last, the first ones. c blocks
 * have a token as likely as the c-th greatest of the blocks' maxima, so none of the c is less likely
 * than that, and few of the others are as likely. scratch: room for [vocab + blocks] floats. */
static void find_likeliest(const void *row, int is_half, int vocab, int c, const float *maxima,
                           float *scratch, int32_t *found, float *values, int64_t *ids) {
    int blocks = (vocab + BLOCK - 1) / BLOCK, n = 0, taken = 0, ties = c;
    float least = -INFINITY;
    if (blocks >= c) {
        memcpy(scratch, maxima, sizeof(float) * blocks);
        least = select_greatest(scratch, blocks, c);
    }
    for (int b = 0; b < blocks; b++) {
        if (maxima[b] < least) continue;
        int start = b * BLOCK, end = vocab - start < BLOCK ? vocab : start + BLOCK;
        for (int i = start; i < end; i++) {
            float x = is_half ? widen(((const uint16_t *)row)[i]) : ((const float *)row)[i];
            if (x < least) continue;
            scratch[n] = x;
            found[n++] = i;
        }
    }
    least = select_greatest(scratch, n, c);
    for (int i = 0; i < c; i++) ties -= scratch[i] > least;
    for (int i = 0; i < n; i++) {
        float x = is_half ? widen(((const uint16_t *)row)[found[i]]) : ((const float *)row)[found[i]];
        if (x < least || (x == least && ties-- <= 0)) continue;
        values[taken] = x;
        ids[taken++] = found[i];
    }
}

/* One row: the maximum of each block of the vocabulary, and of all. NaN if there is a NaN. */
PASS static float pass_maxima(const void *row, int is_half, int vocab, float *maxima) {
    float x[TILE], top = -INFINITY, sum = 0.0f;
    for (int start = 0; start < vocab; start += TILE) {
        int n = vocab - start < TILE ? vocab - start : TILE;
        read_tile(row, is_half, start, n, x);
        for (int i = n; i < TILE; i++) x[i] = -INFINITY;
        for (int b = 0; b * BLOCK < n; b++) {
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (int i = 0; i < BLOCK; i++) {
                float value = x[b * BLOCK + i];
                most = value > most ? value : most;
            }
            maxima[start / BLOCK + b] = most;
            top = most > top ? most : top;
        }
        /* x * 0 is NaN for NaN and the infinities; -infinity is a token that cannot be. */
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++) sum += x[i] == -INFINITY ? 0.0f : x[i] * 0.0f;
    }
    return sum == 0.0f && top > -INFINITY ? top : NAN;
}

/* One row: sums of e, e x and e x^2 for e = exp(x), x the logit less the greatest; and how many
 * logits are at least as great as one. */
PASS static void pass_sums(const void *row, int is_half, int vocab, float top, float wanted,
                           double *sums, int64_t *rank) {
    float x[TILE];
    int64_t at_least = 0;
    for (int start = 0; start < vocab; start += TILE) {
        int n = vocab - start < TILE ? vocab - start : TILE;
        read_tile(row, is_half, start, n, x);
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f;
        int32_t count = 0;
#pragma omp simd reduction(+ : s0, s1, s2, count)
        for (int i = 0; i < n; i++) {
            count += x[i] >= wanted;
            float d = x[i] - top;
            d = d > FLOOR ? d : FLOOR;
            float e = exp_of(d);
            s0 += e;
            s1 += e * d;
            s2 += e * d * d;
        }
        sums[0] += s0;
        sums[1] += s1;
        sums[2] += s2;
        at_least += count;
    }
    *rank = at_least;
}

/* The second of the likeliest tokens' logits, of which the greatest is given. */
static float runner_up(const float *values, int c, float top) {
    float second = -INFINITY;
    int tops = 0;
    for (int i = 0; i < c; i++) {
        tops += values[i] == top;
        if (values[i] < top && values[i] > second) second = values[i];
    }
    return tops > 1 || c == 1 ? top : second;
}

/* See `target_rows` in passes.py. stats: [6, T]. Returns 0, or 1 if memory is short. */
int demur_target_rows(const void *logits, int is_half, int64_t stride, int64_t rows, int vocab,
                      const int64_t *tokens, int c, float *stats, int64_t *rank, float *top_values,
                      int64_t *top_ids) {
    int failed = 0;
#pragma omp parallel
    {
        int blocks = (vocab + BLOCK - 1) / BLOCK;
        float *maxima = malloc(sizeof(float) * (2 * (int64_t)blocks + vocab));
        int32_t *found = malloc(sizeof(int32_t) * vocab);
        if (maxima == NULL || found == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++) {
            if (maxima == NULL || found == NULL) continue;
            const void *row = row_of(logits, is_half, stride, t);
            float top = pass_maxima(row, is_half, vocab, maxima);
            if (!isfinite(top)) {
                for (int i = 0; i < 6; i++) stats[i * rows + t] = NAN;
                rank[t] = 1;
                for (int i = 0; i < c; i++) {
                    top_values[t * c + i] = 0.0f;
                    top_ids[t * c + i] = i;
                }
                continue;
            }
            int64_t token = tokens[t];
            float wanted = is_half ? widen(((const uint16_t *)row)[token])
                                   : ((const float *)row)[token];
            double sums[3] = {0.0, 0.0, 0.0};
            pass_sums(row, is_half, vocab, top, wanted, sums, &rank[t]);
            find_likeliest(row, is_half, vocab, c, maxima, maxima + blocks, found,
                           top_values + t * c, top_ids + t * c);
            double log_z = log(sums[0]), mean = sums[1] / sums[0];
            double variance = sums[2] / sums[0] - mean * mean;
            stats[0 * rows + t] = top;
            stats[1 * rows + t] = (float)log_z;
            stats[2 * rows + t] = (float)fmax(log_z - mean, 0.0);
            stats[3 * rows + t] = (float)sqrt(fmax(variance, 0.0));
            stats[4 * rows + t] = runner_up(top_values + t * c, c, top);
            stats[5 * rows + t] = wanted;
        }
        free(maxima);
        free(found);
    }
    return failed;
}

/* A draft of one row: its logits are base + scale * values. */
typedef struct {
    const void *values; /* [V] */
    int is_half;
    float scale;
    int is_own; /* base is 0 and not the target's logits */
} Draft;

INLINE float logit_of(const void *values, int is_half, float scale, const float *base, int i) {
    float value = is_half ? widen(((const uint16_t *)values)[i]) : ((const float *)values)[i];
    return base[i] + scale * value;
}

/* Sum over a tile of e^(y - shift). Comparisons with NaN are false, so that it stays. */
INLINE float exponentials(const void *values, int is_half, float scale, const float *base,
                          float shift, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        float d = logit_of(values, is_half, scale, base, i) - shift;
        d = d < FLOOR ? FLOOR : d;
        d = d > CEILING ? CEILING : d;
        sum += exp_of(d);
    }
    return sum;
}

/* Over a tile, q = e^(y - ln Z): adds q to the mixture; the sum of q ln q. */
INLINE float entropies(const void *values, int is_half, float scale, const float *base,
                       float log_z, int n, float *mix) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        float l = logit_of(values, is_half, scale, base, i) - log_z;
        l = l < FLOOR ? FLOOR : l;
        float q = exp_of(l);
        mix[i] += q;
        sum += q * l;
    }
    return sum;
}

INLINE float greatest(const void *values, int is_half, float scale, const float *base, int n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < n; i++) {
        float y = logit_of(values, is_half, scale, base, i);
        most = y > most ? y : most;
    }
    return most;
}

INLINE const void *part_of(const Draft *draft, int start) {
    return (const char *)draft->values + (int64_t)start * (draft->is_half ? 2 : 4);
}

/* One row: ln Z of each draft; a guess of its greatest logit is given, and replaced by the logit
 * itself if it was far off. NaN if a logit is not finite. */
PASS static void pass_normalisers(const void *target, int target_half, const Draft *drafts,
                                  int n_drafts, int vocab, float *shift, float *log_z) {
    float x[TILE], zero[TILE] = {0};
    double sum[MAX_DRAFTS];
    for (int again = 0; again < 2; again++) {
        int is_far = 0;
        for (int k = 0; k < n_drafts; k++) sum[k] = 0.0;
        for (int start = 0; start < vocab; start += TILE) {
            int n = vocab - start < TILE ? vocab - start : TILE;
            read_tile(target, target_half, start, n, x);
            for (int k = 0; k < n_drafts; k++) {
                const float *base = drafts[k].is_own ? zero : x;
                const void *values = part_of(&drafts[k], start);
                float scale = drafts[k].scale;
                sum[k] += drafts[k].is_half ? exponentials(values, 1, scale, base, shift[k], n)
                                            : exponentials(values, 0, scale, base, shift[k], n);
            }
        }
        for (int k = 0; k < n_drafts; k++) {
            log_z[k] = (float)(shift[k] + log(sum[k]));
            is_far |= sum[k] > 1e30 || sum[k] < 1e-15;
        }
        if (!is_far) return;
        for (int k = 0; k < n_drafts; k++) shift[k] = -INFINITY;
        for (int start = 0; start < vocab; start += TILE) {
            int n = vocab - start < TILE ? vocab - start : TILE;
            read_tile(target, target_half, start, n, x);
            for (int k = 0; k < n_drafts; k++) {
                const float *base = drafts[k].is_own ? zero : x;
                const void *values = part_of(&drafts[k], start);
                float scale = drafts[k].scale;
                float most = drafts[k].is_half ? greatest(values, 1, scale, base, n)
                                               : greatest(values, 0, scale, base, n);
                shift[k] = most > shift[k] ? most : shift[k];
            }
        }
    }
}

/* One row: total, the sum over drafts of their entropies, and kl. */
PASS static void pass_divergences(const void *target, int target_half, float target_z,
                                  const Draft *drafts, int n_drafts, int vocab,
                                  const float *log_z, double *out) {
    float x[TILE], zero[TILE] = {0}, mix[TILE];
    const float share = 1.0f / n_drafts, tiny = 1.17549435e-38f;
    double total = 0.0, own = 0.0, kl = 0.0;
    for (int start = 0; start < vocab; start += TILE) {
        int n = vocab - start < TILE ? vocab - start : TILE;
        read_tile(target, target_half, start, n, x);
        for (int i = 0; i < n; i++) mix[i] = 0.0f;
        for (int k = 0; k < n_drafts; k++) {
            const float *base = drafts[k].is_own ? zero : x;
            const void *values = part_of(&drafts[k], start);
            float scale = drafts[k].scale;
            own -= drafts[k].is_half ? entropies(values, 1, scale, base, log_z[k], n, mix)
                                     : entropies(values, 0, scale, base, log_z[k], n, mix);
        }
        float t = 0.0f, m = 0.0f;
#pragma omp simd reduction(+ : t, m)
        for (int i = 0; i < n; i++) {
            float mean = mix[i] * share;
            mean = mean < tiny ? tiny : mean;
            float l = log_of(mean), lp = x[i] - target_z;
            lp = lp < FLOOR ? FLOOR : lp;
            t -= mean * l;
            m += mean * (l - lp);
        }
        total += t;
        kl += m;
    }
    out[0] = total;
    out[1] = own;
    out[2] = kl;
}

/* See `measure_rows` in passes.py. drafts: [K, T, V], scale: [K, T], out: [3, T]. */
int demur_measure_rows(const void *target, int target_half, int64_t stride, const float *target_z,
                       const void *drafts, int drafts_half, int64_t draft_stride,
                       int64_t row_stride, int n_drafts, const float *scale, int64_t rows,
                       int vocab, float *out) {
    if (n_drafts < 1 || n_drafts > MAX_DRAFTS) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        const void *row = row_of(target, target_half, stride, t);
        Draft all[MAX_DRAFTS];
        float shift[MAX_DRAFTS], log_z[MAX_DRAFTS];
        for (int k = 0; k < n_drafts; k++) {
            float s = scale[k * rows + t];
            const void *one = row_of(drafts, drafts_half, draft_stride, k);
            all[k].values = row_of(one, drafts_half, row_stride, t);
            all[k].is_half = drafts_half;
            all[k].is_own = s != s;
            all[k].scale = s != s ? 1.0f : s;
            /* A draft that moves the target's logits mostly leaves ln Z about where it is. */
            shift[k] = target_z[t];
        }
        double found[3];
        pass_normalisers(row, target_half, all, n_drafts, vocab, shift, log_z);
        pass_divergences(row, target_half, target_z[t], all, n_drafts, vocab, log_z, found);
        found[1] = found[0] - found[1] / n_drafts;
        double bound = log((double)n_drafts);
        /* Comparisons with NaN are false, so that it stays. */
        out[0 * rows + t] = (float)(found[0] < 0.0 ? 0.0 : found[0]);
        out[1 * rows + t] = (float)(found[1] < 0.0 ? 0.0 : found[1] > bound ? bound : found[1]);
        out[2 * rows + t] = (float)(found[2] < 0.0 ? 0.0 : found[2]);
    }
    return 0;
}

/* KL(q || p) over c tokens for q ~ p e^(s change), and the variance of change under q. */
PASS static void pass_scaled(const float *log_p, const float *change, int c, float s, double *kl,
                             double *variance) {
    float q[TILE], top = -INFINITY, z = 0.0f, first = 0.0f, second = 0.0f, cross = 0.0f;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < c; i++) {
        float y = log_p[i] + s * change[i];
        top = y > top ? y : top;
    }
#pragma omp simd reduction(+ : z, first)
    for (int i = 0; i < c; i++) {
        float d = log_p[i] + s * change[i] - top;
        d = d < FLOOR ? FLOOR : d;
        q[i] = exp_of(d);
        z += q[i];
        first += q[i] * change[i];
    }
    float log_z = (float)log(z) + top, mean = first / z;
#pragma omp simd reduction(+ : second, cross)
    for (int i = 0; i < c; i++) {
        second += q[i] * (change[i] - mean) * (change[i] - mean);
        cross += q[i] * (s * change[i] - log_z);
    }
    *kl = cross / z;
    *variance = second / z;
}

/* A student's mean KL at a scale, and its derivative by ln s. */
static double mean_kl(const float *log_p, float (*changes)[TILE], const float *share, int n_drafts,
                      int c, double s, double tiny, double *slope) {
    double mean = 0.0, variance = 0.0;
    for (int k = 0; k < n_drafts; k++) {
        if (share[k] == 0.0f) continue;
        double kl_k, variance_k;
        pass_scaled(log_p, changes[k], c, (float)s, &kl_k, &variance_k);
        mean += share[k] * kl_k;
        variance += share[k] * variance_k;
    }
    *slope = s * s * variance;
    return mean > tiny ? mean : tiny;
}

static double within(double x, double least, double most) {
    return x < least ? least : x > most ? most : x;
}

/* See `local_scales` in passes.py. likeliest, ids: [T, c]; share: [S, K]; wanted, out: [S, T].
 * Returns 0, or 1 if memory is short or c or K too great. */
int demur_local_scales(const float *likeliest, const int64_t *ids, int c, const void *drafts,
                       int drafts_half, int64_t draft_stride, int64_t row_stride, int n_drafts,
                       const float *share, int n_students, const float *wanted, int64_t rows,
                       int steps, float small, float least, float most, float tiny, float *out) {
    int failed = n_drafts < 1 || n_drafts > MAX_DRAFTS || c < 1 || c > TILE;
    if (failed) return 1;
#pragma omp parallel
    {
        float(*changes)[TILE] = malloc(sizeof(float) * TILE * n_drafts);
        if (changes == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++) {
            if (changes == NULL) continue;
            float log_p[TILE];
            double top = -INFINITY, z = 0.0;
            for (int i = 0; i < c; i++) top = fmax(top, likeliest[t * c + i]);
            for (int i = 0; i < c; i++) z += exp(likeliest[t * c + i] - top);
            for (int i = 0; i < c; i++) {
                log_p[i] = (float)(likeliest[t * c + i] - top - log(z));
                log_p[i] = log_p[i] < FLOOR ? FLOOR : log_p[i];
            }
            for (int k = 0; k < n_drafts; k++) {
                const void *one = row_of(drafts, drafts_half, draft_stride, k);
                const void *row = row_of(one, drafts_half, row_stride, t);
                for (int i = 0; i < c; i++) {
                    int64_t id = ids[t * c + i];
                    changes[k][i] = drafts_half ? widen(((const uint16_t *)row)[id])
                                                : ((const float *)row)[id];
                }
            }
            for (int s = 0; s < n_students; s++) {
                const float *mine = share + s * n_drafts;
                double goal = fmax(wanted[s * rows + t], tiny), slope;
                mean_kl(log_p, changes, mine, n_drafts, c, small, tiny, &slope);
                double log_s = log(small) + 0.5 * log(fmax(2 * goal, tiny) / (slope + tiny));
                log_s = within(log_s, least, most);
                for (int step = 0; step < steps; step++) {
                    double found = mean_kl(log_p, changes, mine, n_drafts, c, exp(log_s), tiny,
                                           &slope);
                    double move = (log(goal) - log(found)) * found / fmax(slope, tiny);
                    log_s = within(log_s + within(move, -1.0, 1.0), least, most);
                }
                out[s * rows + t] = (float)exp(log_s);
            }
        }
        free(changes);
    }
    return failed;
}
