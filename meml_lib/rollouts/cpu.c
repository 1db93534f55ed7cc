/* What a decode step leaves to loops of its own on a CPU. Compiled and described by cpu.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8 /* caches and buffers are as wide as whole vectors; narrower machines take each in parts */
#define WHOLE(n) (((n) + LANES - 1) / LANES * LANES)
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* e^x for x <= 0, to 2 units in the last place; 0 below e^-87. */
static inline float power(float x)
{
    union { float real; uint32_t bits; } n, scale;
    float most = x < -87.0f ? -87.0f : x;
    n.real = most * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the rounded product */
    scale.bits = (n.bits + 127) << 23;
    n.real -= 12582912.0f;
    float r = most - n.real * 0.693359375f + n.real * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r + 1.0f) * scale.real;
    return x < -87.0f ? 0.0f : p;
}

static inline __attribute__((always_inline)) void add_block(
    float *out, const float *weight, const float *row, long rows, long stride, long step, const int vectors)
{
    const int chains = vectors > 4 ? 1 : vectors > 2 ? 2 : 4; /* a sum waits for the one before: several go on at once */
    vector sum[8] = {{0}};
    long i = 0;
    for (; i + chains <= rows; i += chains, row += chains * stride)
        for (int c = 0; c < chains; c++)
            for (int j = 0; j < vectors; j++) sum[c * vectors + j] += weight[i + c] * *(const vector *)(row + c * stride + j * step);
    for (; i < rows; i++, row += stride)
        for (int j = 0; j < vectors; j++) sum[j] += weight[i] * *(const vector *)(row + j * step);
    for (int c = 0; c < chains; c++)
        for (int j = 0; j < vectors; j++) ((vector *)out)[j] += sum[c * vectors + j];
}

/* out += the weighted sum of rows of so many vectors, of which up to 8 stay in registers.
   stride: from a row to the next. step: from a row's vector to its next. */
static void add_weighted(
    float *out, const float *weight, const float *row, long rows, long stride, long step, long vectors)
{
    for (; vectors > 0; vectors -= 8, out += 8 * LANES, row += 8 * step) {
        switch (vectors) {
#define CASE(n) case n: add_block(out, weight, row, rows, stride, step, n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
            default: add_block(out, weight, row, rows, stride, step, 8);
        }
    }
}

static void turn(float *out, const float *x, const float *angle, long size)
{
    for (long d = 0; d < size; d += 2) {
        out[d] = x[d] * angle[d] - x[d + 1] * angle[d + 1];
        out[d + 1] = x[d] * angle[d + 1] + x[d + 1] * angle[d];
    }
}

/* The layouts are told in cpu.py. A key's numbers stand LANES tokens side by side, so that a query's number meets LANES keys. */
void attend(const float *qkv, const float *turn_N, const float *prompt_k, const float *prompt_v, float *own_k, float *own_v,
            const int64_t *prompt_of_row, const int64_t *length, float *out, int64_t rows, int64_t heads, int64_t shared,
            int64_t size, int64_t width, int64_t room, int64_t at, int64_t threads)
{
    const long wide = WHOLE(size), keys = width + at + 1;
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows * heads; i++) {
        const long n = i / heads, p = prompt_of_row[n] * heads + i % heads, far = length[prompt_of_row[n]];
        const float *x = qkv + i * (shared + 2) * size, *k_of_prompt = prompt_k + p * size * width;
        float *k = own_k + i * size * room, *v = own_v + i * room * wide;
        float turned[size], score[width + room], mixed[wide];
        turn(turned, x + shared * size, turn_N + n * size, size);
        for (long d = 0; d < size; d++) k[(at / LANES * size + d) * LANES + at % LANES] = turned[d];
        memcpy(v + at * wide, x + (shared + 1) * size, size * sizeof(float));
        for (long r = 0; r < shared; r++) {
            turn(turned, x + r * size, turn_N + n * size, size);
            memset(score, 0, sizeof score);
            add_weighted(score, turned, k_of_prompt, size, LANES, size * LANES, width / LANES);
            add_weighted(score + width, turned, k, size, LANES, size * LANES, at / LANES + 1);
            for (long t = far; t < width; t++) score[t] = -INFINITY;
            float most = -INFINITY, mass = 0.0f;
#pragma omp simd reduction(max : most)
            for (long t = 0; t < keys; t++) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : mass)
            for (long t = 0; t < keys; t++) mass += score[t] = power(score[t] - most);
            memset(mixed, 0, sizeof mixed);
            add_weighted(mixed, score, prompt_v + p * width * wide, far, wide, LANES, wide / LANES);
            add_weighted(mixed, score + width, v, at + 1, wide, LANES, wide / LANES);
            for (long d = 0; d < size; d++) out[(i * shared + r) * size + d] = mixed[d] / mass;
        }
    }
}

/* What RMSNorm multiplies a row by, beside its weight; 1 where epsilon is below 0. */
static float norm_scale(const float *x, long size, double epsilon)
{
    if (epsilon < 0.0) return 1.0f;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (long d = 0; d < size; d++) squares += x[d] * x[d];
    return 1.0f / sqrtf(squares / size + (float)epsilon);
}

/* Without its weight, which is in the matrix that follows. */
void rms_norm(const float *x, float *out, int64_t rows, int64_t size, double epsilon, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (rows * size > 1 << 15) /* two threads are slower at less */
    for (long n = 0; n < rows; n++) {
        const float scale = norm_scale(x + n * size, size, epsilon);
        for (long d = 0; d < size; d++) out[n * size + d] = x[n * size + d] * scale;
    }
}

/* Products take PANEL outputs of ROWS rows at a time, whose sums stay in 12 registers. */
#define PANEL 16
#ifdef __AVX512F__
#define PART 16
#else
#define PART 8
#endif
#define PARTS (PANEL / PART)
#define ROWS (12 / PARTS)
typedef float part __attribute__((vector_size(4 * PART), aligned(4), may_alias));

static inline float silu(float x)
{
    const float p = power(x < 0.0f ? x : -x);
    return (x < 0.0f ? x * p : x) / (1.0f + p);
}

/* out[n] = or += W x[n] + bias, or silu(first half) * second half of it; x normed first unless epsilon < 0.
   panels: W as [M / PANEL, K, PANEL], padded; a gate's panel holds PANEL / 2 of each half. */
void product(const float *x, const float *panels, const float *bias, float *out, int64_t rows, int64_t inputs,
             int64_t outputs, double epsilon, int64_t add, int64_t gated, int64_t threads)
{
    const long count = (outputs + PANEL - 1) / PANEL, wide = gated ? outputs / 2 : outputs;
#pragma omp parallel for num_threads(threads)
    for (long from = 0; from < rows; from += ROWS) {
        const long here = rows - from < ROWS ? rows - from : ROWS;
        float turned[inputs * ROWS], tile[ROWS][PANEL];
        memset(turned, 0, sizeof turned);
        for (long r = 0; r < here; r++) {
            const float *own = x + (from + r) * inputs;
            const float scale = norm_scale(own, inputs, epsilon);
            for (long k = 0; k < inputs; k++) turned[k * ROWS + r] = own[k] * scale;
        }
        for (long n = 0; n < count; n++) {
            const float *panel = panels + n * inputs * PANEL;
            part sum[ROWS][PARTS];
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < PARTS; j++) sum[r][j] = *(const part *)(bias + n * PANEL + j * PART);
            for (long k = 0; k < inputs; k++)
                for (int r = 0; r < ROWS; r++)
                    for (int j = 0; j < PARTS; j++)
                        sum[r][j] += turned[k * ROWS + r] * *(const part *)(panel + k * PANEL + j * PART);
            memcpy(tile, sum, sizeof tile);
            for (long r = 0; r < here; r++) {
                float *y = out + (from + r) * wide + n * (gated ? PANEL / 2 : PANEL);
                const long columns = outputs - n * PANEL < PANEL ? outputs - n * PANEL : PANEL;
                if (gated)
                    for (int c = 0; c < PANEL / 2; c++) y[c] = silu(tile[r][c]) * tile[r][c + PANEL / 2];
                else
                    for (long c = 0; c < columns; c++) y[c] = tile[r][c] + (add ? y[c] : 0.0f);
            }
        }
    }
}

#define BLOCK 64 /* words whose probabilities are summed before one of the blocks, then one of its words is drawn */

/* The first word that takes the sum of probabilities above the target; where rounding leaves none, the last possible. */
static long draw(const float *x, float most, float heat, const double *heated, long words, double target)
{
    const long blocks = (words + BLOCK - 1) / BLOCK;
    double upto = 0.0;
    long block = 0, drawn = 0;
    for (long b = 0; b < blocks; b++) {
        if (heated[b] == 0.0) continue;
        upto += block < b ? heated[block] : 0.0;
        block = b;
        if (upto + heated[b] > target) break;
    }
    for (long t = block * BLOCK; t < words && t < (block + 1) * BLOCK; t++) {
        const float p = power((x[t] - most) * heat);
        if (p == 0.0f) continue;
        drawn = t;
        if ((upto += p) > target) break;
    }
    return drawn;
}

void choose(const float *logits, const double *uniform, int64_t *token, float *logp, float *entropy, int64_t rows,
            int64_t words, double temperature, int64_t threads)
{
    const long blocks = (words + BLOCK - 1) / BLOCK;
    const float heat = temperature > 0.0 ? 1.0 / temperature : 1.0;
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < rows; n++) {
        const float *x = logits + n * words;
        double heated[blocks], mass = 0.0, mixed = 0.0, all = 0.0;
        float most = -INFINITY;
        long chosen = 0;
#pragma omp simd reduction(max : most)
        for (long t = 0; t < words; t++) most = x[t] > most ? x[t] : most;
        for (long b = 0; b < blocks; b++) {
            const long end = (b + 1) * BLOCK < words ? (b + 1) * BLOCK : words;
            double here = 0.0, below = 0.0, hot = 0.0;
#pragma omp simd reduction(+ : here, below)
            for (long t = b * BLOCK; t < end; t++) {
                const float p = power(x[t] - most);
                here += p;
                below += p > 0.0f ? p * (x[t] - most) : 0.0f; /* 0 times an impossible word's -inf is nan */
            }
            if (heat != 1.0f) {
#pragma omp simd reduction(+ : hot)
                for (long t = b * BLOCK; t < end; t++) hot += power((x[t] - most) * heat);
            }
            all += heated[b] = heat != 1.0f ? hot : here;
            mass += here;
            mixed += below;
        }
        if (temperature > 0.0)
            chosen = draw(x, most, heat, heated, words, uniform[n] * all);
        else
            while (chosen + 1 < words && x[chosen] < most) chosen++;
        token[n] = chosen;
        logp[n] = x[chosen] - most - log(mass);
        entropy[n] = log(mass) - mixed / mass;
    }
}
