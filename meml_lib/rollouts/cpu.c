/* What a decode step and an update leave to loops of their own on a CPU. Compiled and described by cpu.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#define TILES
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX
#endif
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8 /* narrower machines take a vector in parts */
#endif
#define INLINE static inline __attribute__((always_inline))
#define WHOLE(n) (((n) + LANES - 1) / LANES * LANES)
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* To bfloat16, and back. */
static inline uint16_t rounded(float x)
{
    union { float real; uint32_t bits; } n = {x};
    return x == x ? (n.bits + 0x7fff + (n.bits >> 16 & 1)) >> 16 : 0x7fc0;
}

static inline float widened(uint16_t x)
{
    union { uint32_t bits; float real; } n = {(uint32_t)x << 16};
    return n.real;
}

/* Some loops work on bfloat16 (half) or float32, and round what they hand on where torch would. INLINE is compiled for both, within
   the parallel loops, which would hide which of them it is. */
#define FOR_BOTH(call, ...) do { if (half) call(__VA_ARGS__, 1); else call(__VA_ARGS__, 0); } while (0)
INLINE float get(const void *x, long i, const int half) { return half ? widened(((const uint16_t *)x)[i]) : ((const float *)x)[i]; }
INLINE float kept(float x, const int half) { return half ? widened(rounded(x)) : x; }
INLINE void put(void *x, long i, float y, const int half)
{
    if (half) ((uint16_t *)x)[i] = rounded(y);
    else ((float *)x)[i] = y;
}

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

/* Caches and buffers are as wide as whole vectors. */
int64_t lanes(void) { return LANES; }

typedef uint16_t narrow_vector __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits_vector __attribute__((vector_size(4 * LANES)));

/* LANES numbers from x[i] on, of bfloat16 (half) or float32. */
INLINE vector take(const void *x, long i, const int half)
{
    if (!half) return *(const vector *)((const float *)x + i);
    return (vector)(__builtin_convertvector(*(const narrow_vector *)((const uint16_t *)x + i), bits_vector) << 16);
}

INLINE void add_block(
    float *out, long apart, const float *weight, long between, const void *row, long at, long rows, long stride, long step,
    const int sums, const int vectors, const int half)
{
    const int width = sums * vectors;
    const int chains = width > 4 ? 1 : width > 2 ? 2 : 4; /* a sum waits for the one before: several go on at once */
    vector sum[12] = {{0}};
    long i = 0;
    for (; i + chains <= rows; i += chains, at += chains * stride)
        for (int c = 0; c < chains; c++)
            for (int j = 0; j < vectors; j++)
                for (int s = 0; s < sums; s++)
                    sum[c * width + s * vectors + j] += weight[s * between + i + c] * take(row, at + c * stride + j * step, half);
    for (; i < rows; i++, at += stride)
        for (int j = 0; j < vectors; j++)
            for (int s = 0; s < sums; s++) sum[s * vectors + j] += weight[s * between + i] * take(row, at + j * step, half);
    for (int c = 0; c < chains; c++)
        for (int s = 0; s < sums; s++)
            for (int j = 0; j < vectors; j++) ((vector *)(out + s * apart))[j] += sum[c * width + s * vectors + j];
}

/* To each of up to 4 outs add a weighted sum of the same rows of so many vectors; up to 12 sums stay in registers.
   apart, between: from an out, from an out's weights to the next. at, stride: of the first row's first number, to the next row's.
   step: from a row's vector to its next. */
static void add_weighted(float *out, long apart, const float *weight, long between, const void *row, long at, long rows, long stride,
                         long step, int sums, long vectors, int half)
{
    const long most = sums == 1 ? 8 : 12 / sums;
    for (; vectors > 0; vectors -= most, out += most * LANES, at += most * step) {
        switch (sums * 16 + (vectors < most ? vectors : most)) {
#define CASE(s, n) case s * 16 + n: FOR_BOTH(add_block, out, apart, weight, between, row, at, rows, stride, step, s, n); break;
            CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
            CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6)
            CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4) CASE(4, 1) CASE(4, 2) CASE(4, 3)
#undef CASE
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

/* A decode step's loops are shared out among the threads that come to them together; functions that are handed a number of
   threads gather them first.

   The layouts are told in cpu.py. A key's numbers stand LANES tokens side by side, so that a query's number meets LANES keys. */
static void attend_together(const float *qkv, const float *turn_N, const void *prompt_k, const void *prompt_v, void *own_k, void *own_v,
                            const int64_t *prompt_of_row, const int64_t *length, float *out, long rows, long heads, long shared,
                            long size, long width, long room, long at, int half)
{
    const long wide = WHOLE(size), keys = width + at + 1;
#pragma omp for
    for (long i = 0; i < rows * heads; i++) {
        const long n = i / heads, p = prompt_of_row[n] * heads + i % heads, far = length[prompt_of_row[n]];
        const float *x = qkv + i * (shared + 2) * size;
        const long k = i * size * room, v = i * room * wide, apart = width + room;
        const long most_asked = apart > 1 << 14 ? 1 : shared < 4 ? shared : 4; /* stacks are small */
        float turned[most_asked * size], score[most_asked * apart], mixed[most_asked * wide];
        turn(turned, x + shared * size, turn_N + n * size, size);
        for (long d = 0; d < size; d++) put(own_k, k + (at / LANES * size + d) * LANES + at % LANES, turned[d], half);
        for (long d = 0; d < size; d++) put(own_v, v + at * wide + d, x[(shared + 1) * size + d], half);
        for (long from = 0; from < shared; from += most_asked) { /* queries that read each key and value once */
            const int asked = shared - from < most_asked ? shared - from : most_asked;
            for (int s = 0; s < asked; s++) turn(turned + s * size, x + (from + s) * size, turn_N + n * size, size);
            memset(score, 0, asked * apart * sizeof *score);
            add_weighted(score, apart, turned, size, prompt_k, p * size * width, size, LANES, size * LANES, asked, width / LANES, half);
            add_weighted(score + width, apart, turned, size, own_k, k, size, LANES, size * LANES, asked, at / LANES + 1, half);
            float mass[most_asked];
            for (int s = 0; s < asked; s++) {
                float *own = score + s * apart, most = -INFINITY, sum = 0.0f;
                for (long t = far; t < width; t++) own[t] = -INFINITY;
#pragma omp simd reduction(max : most)
                for (long t = 0; t < keys; t++) most = own[t] > most ? own[t] : most;
#pragma omp simd reduction(+ : sum)
                for (long t = 0; t < keys; t++) sum += own[t] = power(own[t] - most);
                mass[s] = sum;
            }
            memset(mixed, 0, asked * wide * sizeof *mixed);
            add_weighted(mixed, wide, score, apart, prompt_v, p * width * wide, far, wide, LANES, asked, wide / LANES, half);
            add_weighted(mixed, wide, score + width, apart, own_v, v, at + 1, wide, LANES, asked, wide / LANES, half);
            for (int s = 0; s < asked; s++)
                for (long d = 0; d < size; d++) out[(i * shared + from + s) * size + d] = mixed[s * wide + d] / mass[s];
        }
    }
}

void attend(const float *qkv, const float *turn_N, const void *prompt_k, const void *prompt_v, void *own_k, void *own_v,
            const int64_t *prompt_of_row, const int64_t *length, float *out, int64_t rows, int64_t heads, int64_t shared,
            int64_t size, int64_t width, int64_t room, int64_t at, int64_t half, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    attend_together(qkv, turn_N, prompt_k, prompt_v, own_k, own_v, prompt_of_row, length, out, rows, heads, shared, size, width, room,
                    at, half);
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
static void product_together(const float *x, const float *panels, const float *bias, float *out, long rows, long inputs,
                             long outputs, double epsilon, int add, int gated)
{
    const long count = (outputs + PANEL - 1) / PANEL, wide = gated ? outputs / 2 : outputs;
#pragma omp for
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

void product(const float *x, const float *panels, const float *bias, float *out, int64_t rows, int64_t inputs, int64_t outputs,
             double epsilon, int64_t add, int64_t gated, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    product_together(x, panels, bias, out, rows, inputs, outputs, epsilon, add, gated);
}

#ifdef AMX
static int amx;
#endif

/* How `tile_product` works from now on: 2 by AMX, if wanted and the system lets this process use it, 1 without, 0 not at all. */
int64_t way_of_tiles(int64_t wanted)
{
#ifdef AMX
    amx = wanted == 2 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tiles' data */) == 0;
    return 1 + amx;
#elif defined(TILES)
    return 1;
#else
    return 0;
#endif
}

#ifdef TILES
#define TILE 16  /* rows of a tile, and outputs of another: as many as a vector of AVX-512 has sums */
#define DEPTH 32 /* bfloat16 numbers that they meet in */
#define AHEAD 4096 /* numbers; a matrix comes from memory, faster when asked for so early */

/* W [M, K] as `tile_product` reads it: output m is line[m] of the weight, times rows' number of that line and columns' of each
   input, in float32; these may be NULL. */
void lay_tiles(const uint16_t *weight, const int64_t *line, const float *rows, const float *columns, uint16_t *tiles, int64_t outputs,
               int64_t inputs, int64_t threads)
{
    const long deep = (inputs + DEPTH - 1) / DEPTH, count = (outputs + 2 * TILE - 1) / (2 * TILE);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count * deep; i++) {
        const long first = i / deep * 2 * TILE, from = i % deep * DEPTH, here = inputs - from < DEPTH ? inputs - from : DEPTH;
        union { uint16_t number[2 * TILE][DEPTH]; uint32_t pair[2 * TILE][DEPTH / 2]; } own;
        uint32_t *tile = (uint32_t *)(tiles + i * 2 * TILE * DEPTH);
        memset(&own, 0, sizeof own);
        for (long o = 0; o < 2 * TILE && first + o < outputs; o++) {
            const long m = line[first + o];
            const uint16_t *w = weight + m * inputs + from;
            const float by = rows ? rows[m] : 1.0f;
            for (long k = 0; k < here; k++) own.number[o][k] = rounded(widened(w[k]) * (columns ? columns[from + k] : 1.0f) * by);
        }
        for (int half = 0; half < 2; half++)
            for (int d = 0; d < DEPTH / 2; d++)
                for (int o = 0; o < TILE; o++) tile[(half * TILE + d) * TILE + o] = own.pair[half * TILE + o][d];
    }
}

/* sum = up to 32 rows of x times a block of 32 outputs, of which there are 16 rows' or 32 rows' places; `first`: memory is asked
   for what is AHEAD, which later rows find in the caches. Two ways: in tiles of 16 rows (AMX), or a pair of inputs of a row
   against 16 outputs at a time (AVX-512). */
#ifdef AMX
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} EIGHT_TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void multiply_tiles(const uint16_t *a, const uint16_t *w, float (*sum)[2 * TILE], long rows, long deep, int first)
{
    const long row = deep * DEPTH;
    const uint16_t *below = a + (rows > TILE ? TILE * row : 0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < deep; k++) {
        const uint16_t *pair = w + k * 2 * TILE * DEPTH;
        _tile_loadd(6, pair, 2 * DEPTH);
        _tile_loadd(7, pair + TILE * DEPTH, 2 * DEPTH);
        for (int line = 0; line < 2 * TILE && first; line++) __builtin_prefetch(pair + AHEAD + line * DEPTH, 0, 2);
        _tile_loadd(4, a + k * DEPTH, row * sizeof *a);
        _tile_loadd(5, below + k * DEPTH, row * sizeof *a);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum[0], sizeof *sum);
    _tile_stored(1, sum[0] + TILE, sizeof *sum);
    _tile_stored(2, sum[TILE], sizeof *sum);
    _tile_stored(3, sum[TILE] + TILE, sizeof *sum);
}
#endif

#define MOST 12 /* rows whose sums stay in registers */

INLINE void multiply_rows(const uint16_t *a, const uint16_t *w, float (*sum)[2 * TILE], long deep, int first, const int rows)
{
    __m512 own[MOST][2];
    for (int r = 0; r < rows; r++) own[r][0] = own[r][1] = _mm512_setzero_ps();
    for (long k = 0; k < deep; k++, w += 2 * TILE * DEPTH)
        for (int d = 0; d < DEPTH / 2; d++) {
            const __m512bh left = (__m512bh)_mm512_loadu_si512(w + d * DEPTH);
            const __m512bh right = (__m512bh)_mm512_loadu_si512(w + (TILE + d) * DEPTH);
            if (first) {
                __builtin_prefetch(w + AHEAD + d * DEPTH, 0, 2);
                __builtin_prefetch(w + AHEAD + (TILE + d) * DEPTH, 0, 2);
            }
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, a + r * deep * DEPTH + k * DEPTH + 2 * d, sizeof pair);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                own[r][0] = _mm512_dpbf16_ps(own[r][0], both, left);
                own[r][1] = _mm512_dpbf16_ps(own[r][1], both, right);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(sum[r] + half * TILE, own[r][half]);
}

static void multiply(const uint16_t *a, const uint16_t *w, float (*sum)[2 * TILE], long rows, long deep, int first)
{
#ifdef AMX
    if (amx) {
        multiply_tiles(a, w, sum, rows, deep, first);
        return;
    }
#endif
    for (long r = 0; r < rows; r += MOST, first = 0) {
        const uint16_t *own = a + r * deep * DEPTH;
        switch ((rows - r + 3) / 4) { /* places of rows come in whole tiles */
            case 1: multiply_rows(own, w, sum + r, deep, first, 4); break;
            case 2: multiply_rows(own, w, sum + r, deep, first, 8); break;
            default: multiply_rows(own, w, sum + r, deep, first, MOST);
        }
    }
}

/* `product` of a bfloat16 matrix; x is rounded to bfloat16 after its norm.
   narrow: room for x, rows and inputs in whole tiles. tiles: W as [M / 32, K / 32, 2, 16, 16, 2]: of 32 outputs and 32 inputs
   two tiles, each as pairs of inputs by outputs; a gate's first tile is of the first half, its second of the other. */
static void tile_product_together(const float *x, uint16_t *narrow, const uint16_t *tiles, const float *bias, float *out, long rows,
                                  long inputs, long outputs, double epsilon, int add, int gated)
{
    const long deep = (inputs + DEPTH - 1) / DEPTH, high = (rows + TILE - 1) / TILE * TILE, row = deep * DEPTH;
    const long count = (outputs + 2 * TILE - 1) / (2 * TILE), wide = gated ? outputs / 2 : outputs;
#pragma omp for
    for (long n = 0; n < high; n++) {
        const float *own = x + n * inputs, scale = n < rows ? norm_scale(own, inputs, epsilon) : 0.0f;
        for (long k = 0; k < inputs && n < rows; k++) narrow[n * row + k] = rounded(own[k] * scale);
        const long from = n < rows ? inputs : 0;
        memset(narrow + n * row + from, 0, (row - from) * sizeof *narrow);
    }
    float sum[2 * TILE][2 * TILE]; /* of so many rows so many outputs */
#ifdef AMX
    __asm__ volatile("" ::: "memory"); /* tiles are loaded unseen by the compiler, which must have written x by now */
    if (amx) _tile_loadconfig(&EIGHT_TILES);
#endif
#pragma omp for
    for (long b = 0; b < count; b++)
        for (long from = 0; from < rows; from += 2 * TILE) {
            const long here = rows - from < 2 * TILE ? rows - from : 2 * TILE;
            const float *more = bias + b * 2 * TILE;
            multiply(narrow + from * row, tiles + b * row * 2 * TILE, sum, here, deep, from == 0);
            for (long r = 0; r < here; r++) {
                float *y = out + (from + r) * wide + b * (gated ? TILE : 2 * TILE);
                if (gated)
                    for (int c = 0; c < TILE; c++) y[c] = silu(sum[r][c] + more[c]) * (sum[r][TILE + c] + more[TILE + c]);
                else
                    for (long c = 0; c < 2 * TILE && b * 2 * TILE + c < outputs; c++)
                        y[c] = sum[r][c] + more[c] + (add ? y[c] : 0.0f);
            }
        }
#ifdef AMX
    if (amx) _tile_release();
#endif
}

void tile_product(const float *x, uint16_t *narrow, const uint16_t *tiles, const float *bias, float *out, int64_t rows, int64_t inputs,
                  int64_t outputs, double epsilon, int64_t add, int64_t gated, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    tile_product_together(x, narrow, tiles, bias, out, rows, inputs, outputs, epsilon, add, gated);
}
#endif

/* A layer's matrices, as products read them, and the keys and values that it attends to. */
typedef struct {
    const void *qkv, *out, *gated, *down;
    const float *qkv_bias, *out_bias, *gated_bias, *down_bias;
    const void *prompt_k, *prompt_v;
    void *own_k, *own_v;
} layer;

static void any_product(const float *x, uint16_t *narrow, const void *weight, const float *bias, float *out, long rows, long inputs,
                        long outputs, double epsilon, int add, int gated, int tiles)
{
#ifdef TILES
    if (tiles) {
        tile_product_together(x, narrow, weight, bias, out, rows, inputs, outputs, epsilon, add, gated);
        return;
    }
#endif
    product_together(x, weight, bias, out, rows, inputs, outputs, epsilon, add, gated);
}

/* One token of each row through all layers: x [rows, hidden] becomes what the last one makes of it.
   qkv, mixed, gated, narrow: room. tiles: matrices are laid out in them. half: keys and values are bfloat16. */
void decode(float *x, const layer *layers, const float *turn_N, const int64_t *prompt_of_row, const int64_t *length, float *qkv,
            float *mixed, float *gated, uint16_t *narrow, int64_t count, int64_t rows, int64_t hidden, int64_t heads, int64_t shared,
            int64_t size, int64_t inner, int64_t width, int64_t room, int64_t at, double epsilon, int64_t tiles, int64_t half, int64_t threads)
{
    const long asked = heads * shared * size, all = heads * (shared + 2) * size;
#pragma omp parallel num_threads(threads)
    for (const layer *l = layers; l < layers + count; l++) {
        any_product(x, narrow, l->qkv, l->qkv_bias, qkv, rows, hidden, all, epsilon, 0, 0, tiles);
        attend_together(qkv, turn_N, l->prompt_k, l->prompt_v, l->own_k, l->own_v, prompt_of_row, length, mixed, rows, heads, shared,
                        size, width, room, at, half);
        any_product(mixed, narrow, l->out, l->out_bias, x, rows, asked, hidden, -1.0, 1, 0, tiles);
        any_product(x, narrow, l->gated, l->gated_bias, gated, rows, hidden, 2 * inner, epsilon, 0, 1, tiles);
        any_product(gated, narrow, l->down, l->down_bias, x, rows, inner, hidden, -1.0, 1, 0, tiles);
    }
}

INLINE void norm_row(const void *x, const void *weight, void *y, float *scale, long n, long size, double epsilon, const int half)
{
    float own[size];
    for (long d = 0; d < size; d++) own[d] = get(x, n * size + d, half);
    const float by = scale[n] = norm_scale(own, size, epsilon);
    for (long d = 0; d < size; d++) put(y, n * size + d, get(weight, d, half) * kept(own[d] * by, half), half);
}

void norm(const void *x, const void *weight, void *y, float *scale, int64_t rows, int64_t size, double epsilon, int64_t half,
          int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < rows; n++) FOR_BOTH(norm_row, x, weight, y, scale, n, size, epsilon);
}

INLINE void norm_row_back(const void *grad, const void *x, const void *weight, const float *scale, void *grad_x, float *sum, long n,
                          long size, const int half)
{
    float unit[size], slope[size], along = 0.0f;
    for (long d = 0; d < size; d++) {
        const float g = get(grad, n * size + d, half);
        unit[d] = get(x, n * size + d, half) * scale[n];
        slope[d] = kept(g * get(weight, d, half), half);
        sum[d] += g * kept(unit[d], half);
    }
#pragma omp simd reduction(+ : along)
    for (long d = 0; d < size; d++) along += slope[d] * unit[d];
    along /= size;
    for (long d = 0; d < size; d++) put(grad_x, n * size + d, (slope[d] - unit[d] * along) * scale[n], half);
}

/* grad_weight: zeros, a row for each thread. */
void norm_back(const void *grad, const void *x, const void *weight, const float *scale, void *grad_x, float *grad_weight,
               int64_t rows, int64_t size, int64_t half, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long part = 0; part < threads; part++)
        for (long n = part * rows / threads; n < (part + 1) * rows / threads; n++)
            FOR_BOTH(norm_row_back, grad, x, weight, scale, grad_x, grad_weight + part * size, n, size);
}

INLINE void rotate_token(const void *x, const void *cos, const void *sin, void *y, long t, long heads, long size, float way,
                         const int half)
{
    for (long from = t * heads * size; from < (t + 1) * heads * size; from += size)
        for (long d = 0; d < size / 2; d++) {
            const float c = get(cos, t * size + d, half), s = way * get(sin, t * size + d, half);
            const float left = get(x, from + d, half), right = get(x, from + size / 2 + d, half);
            put(y, from + d, kept(left * c, half) - kept(right * s, half), half);
            put(y, from + size / 2 + d, kept(right * c, half) + kept(left * s, half), half);
        }
}

void rotate(const void *x, const void *cos, const void *sin, void *y, int64_t tokens, int64_t heads, int64_t size, double way,
            int64_t half, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long t = 0; t < tokens; t++) FOR_BOTH(rotate_token, x, cos, sin, y, t, heads, size, way);
}

#define SHARE 4096 /* numbers that a thread takes at a time */

INLINE void gate_share(const void *gate, const void *up, void *y, long from, long end, const int half)
{
    for (long i = from; i < end; i++) put(y, i, kept(silu(get(gate, i, half)), half) * get(up, i, half), half);
}

void gate(const void *gate, const void *up, void *y, int64_t count, int64_t half, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += SHARE) FOR_BOTH(gate_share, gate, up, y, i, i + SHARE < count ? i + SHARE : count);
}

INLINE void gate_share_back(const void *grad, const void *gate, const void *up, void *grad_gate, void *grad_up, long from, long end,
                            const int half)
{
    for (long i = from; i < end; i++) {
        const float g = get(grad, i, half), x = get(gate, i, half), p = power(x < 0.0f ? x : -x);
        const float sigmoid = (x < 0.0f ? p : 1.0f) / (1.0f + p);
        put(grad_gate, i, kept(g * get(up, i, half), half) * sigmoid * (1.0f + x * (1.0f - sigmoid)), half);
        put(grad_up, i, g * kept(x * sigmoid, half), half);
    }
}

void gate_back(const void *grad, const void *gate, const void *up, void *grad_gate, void *grad_up, int64_t count, int64_t half,
               int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += SHARE)
        FOR_BOTH(gate_share_back, grad, gate, up, grad_gate, grad_up, i, i + SHARE < count ? i + SHARE : count);
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

INLINE void score_row(const void *logits, const int64_t *token, float *lse, float *logp, long n, long words, const int half)
{
    float most = -INFINITY;
    double mass = 0.0;
#pragma omp simd reduction(max : most)
    for (long t = 0; t < words; t++) {
        const float x = get(logits, n * words + t, half);
        most = x > most ? x : most;
    }
    for (long from = 0; from < words; from += BLOCK) {
        const long end = from + BLOCK < words ? from + BLOCK : words;
        float here = 0.0f;
#pragma omp simd reduction(+ : here)
        for (long t = from; t < end; t++) here += power(get(logits, n * words + t, half) - most);
        mass += here;
    }
    lse[n] = most + log(mass);
    logp[n] = get(logits, n * words + token[n], half) - most - log(mass);
}

void score(const void *logits, const int64_t *token, float *lse, float *logp, int64_t rows, int64_t words, int64_t half,
           int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < rows; n++) FOR_BOTH(score_row, logits, token, lse, logp, n, words);
}

INLINE void score_row_back(void *logits, const int64_t *token, const float *lse, const float *grad, long n, long words, const int half)
{
    const float own = get(logits, n * words + token[n], half) - lse[n];
    for (long t = 0; t < words; t++) {
        const float x = get(logits, n * words + t, half) - lse[n]; /* nan stays nan */
        put(logits, n * words + t, -grad[n] * power(x > 0.0f ? 0.0f : x), half);
    }
    put(logits, n * words + token[n], grad[n] * (1.0f - power(own > 0.0f ? 0.0f : own)), half);
}

/* Logits become the gradient by them. */
void score_back(void *logits, const int64_t *token, const float *lse, const float *grad, int64_t rows, int64_t words,
                int64_t half, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < rows; n++) FOR_BOTH(score_row_back, logits, token, lse, grad, n, words);
}

INLINE void add_squares(const void *x, double *sum, long from, long end, const int half)
{
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (long i = from; i < end; i++) squares += get(x, i, half) * get(x, i, half);
    *sum += squares;
}

/* Sums of squares of so many parts, all but the last of one length: as many as threads, so that the sum of sums is the same in
   every run. */
void square_sums(const void *x, double *sums, int64_t parts, int64_t numbers, int64_t half, int64_t threads)
{
    const long each = (numbers + parts - 1) / parts;
#pragma omp parallel for num_threads(threads)
    for (long part = 0; part < parts; part++) {
        double sum = 0.0;
        for (long from = part * each; from < (part + 1) * each && from < numbers; from += 1024) {
            const long most = (part + 1) * each < numbers ? (part + 1) * each : numbers;
            FOR_BOTH(add_squares, x, &sum, from, from + 1024 < most ? from + 1024 : most);
        }
        sums[part] = sum;
    }
}

INLINE void adamw_share(void *weight, const void *grad, float *master, float *mean, float *square, long from, long end, float share,
                        float decay, float beta1, float beta2, float length, float unbiased, float epsilon, const int half)
{
#pragma omp simd /* no tensor overlaps another */
    for (long i = from; i < end; i++) {
        const float g = get(grad, i, half) * share;
        mean[i] += (g - mean[i]) * (1.0f - beta1);
        square[i] = square[i] * beta2 + g * g * (1.0f - beta2);
        master[i] = master[i] * decay - length * mean[i] / (sqrtf(square[i]) * unbiased + epsilon);
        put(weight, i, master[i], half);
    }
}

void adamw(void *weight, const void *grad, float *master, float *mean, float *square, int64_t count, double share, double decay,
           double beta1, double beta2, double length, double unbiased, double epsilon, int64_t half, int64_t threads)
{
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += SHARE)
        FOR_BOTH(adamw_share, weight, grad, master, mean, square, i, i + SHARE < count ? i + SHARE : count, share, decay, beta1, beta2,
                 length, unbiased, epsilon);
}
