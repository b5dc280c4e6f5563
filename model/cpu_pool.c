/* ReLU, response normalisation and 3x3 max-pooling with stride 2 in one pass over NHWC on a CPU.
 *
 * In: fp32 or bf16, which is computed with in fp32. What is kept for the gradient is the input, and one byte for
 * each output: where in its window the maximum was. An image is one thread's, and a few of its rows lie in the cache.
 * `plain_normalise_and_pool` of fused.py says what is computed; normalised values are rounded to the input's type
 * before they are compared, as there, so that both choose the same maximum. NaN stays NaN.
 *
 * The loops are written for the compiler to vectorise: over neighbouring channels, without branches.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Compiled for each, and chosen as the library is loaded. Without contracted operations all give the same bits. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

#define K 2.0f
#define BETA 0.75f
#define SPATIAL_K 1.0f
#define SPATIAL_ALPHA (1e-3f / 25) /* on the sum */

enum { WINDOW = 5, REACH = 2 };
enum { NOWHERE = 9 }; /* the place of a maximum that the ReLU cut off */

typedef struct {
    int images, height, width, channels, towers;
    int bf16, relu_first, spatial_norm;
    float alpha; /* on the sum */
} Options;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The upper half of the bits, rounded to the nearest, to the even one of two. */
INLINE uint32_t upper_half(float value) {
    uint32_t bits = as_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (value == value ? rounded : bits | 0x400000) >> 16;
}

INLINE void load(const Options *o, const void *source, size_t first, float *restrict row, int count) {
    if (o->bf16) {
        const uint16_t *restrict from = (const uint16_t *)source + first;
        for (int i = 0; i < count; i++) row[i] = as_float((uint32_t)from[i] << 16);
    } else {
        memcpy(row, (const float *)source + first, count * sizeof *row);
    }
}

INLINE void store(const Options *o, const float *restrict row, void *target, size_t first, int count) {
    if (o->bf16) {
        uint16_t *restrict to = (uint16_t *)target + first;
        for (int i = 0; i < count; i++) to[i] = upper_half(row[i]);
    } else {
        memcpy((float *)target + first, row, count * sizeof *row);
    }
}

/* d^-1/4, by Newton's method from a quarter of the exponent; 0 of infinity. */
INLINE float inverse_fourth_root(float d) {
    float y = as_float(0x4f58cae5 - (as_bits(d) >> 2));
    for (int i = 0; i < 3; i++) y *= 1.25f - 0.25f * (d * (y * y)) * (y * y);
    return d > 3.402823466e38f ? 0.0f : y;
}

/* Squares of `row`, with zeros at either end of each tower. */
INLINE void squares(const Options *o, const float *restrict row, float *restrict padded) {
    int channels = o->channels / o->towers;
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        float *restrict to = padded + strip * (channels + 2 * REACH) + REACH;
        for (int c = 0; c < channels; c++) to[c] = a[c] * a[c];
    }
}

INLINE float window_sum(const float *first) { return first[0] + first[1] + first[2] + first[3] + first[4]; }

/* What is normalised of row h. */
INLINE void read_row(const Options *o, const void *x, int h, float *restrict row) {
    int count = o->width * o->channels;
    load(o, x, (size_t)h * count, row, count);
    if (o->relu_first)
        for (int i = 0; i < count; i++) row[i] = row[i] < 0 ? 0.0f : row[i];
}

INLINE void round_row(const Options *o, float *restrict row) {
    if (o->bf16)
        for (int i = 0; i < o->width * o->channels; i++) row[i] = as_float(upper_half(row[i]) << 16);
}

/* b = a d^-3/4 with d = k + alpha * the sum of a^2 over channels. */
INLINE void normalise(const Options *o, const float *restrict row, float *restrict padded, float *restrict result) {
    int channels = o->channels / o->towers;
    squares(o, row, padded);
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict square = padded + strip * (channels + 2 * REACH);
        float *restrict b = result + strip * channels;
        for (int c = 0; c < channels; c++) {
            float root = inverse_fourth_root(K + o->alpha * window_sum(square + c));
            b[c] = a[c] * (root * root * root);
        }
    }
    round_row(o, result);
}

/* With g the gradient of b, that of a is g d^-3/4 - 2 alpha beta a * the sum of g a d^-7/4. In place. */
INLINE void normalise_backward(const Options *o, const float *restrict row, float *restrict padded,
                               float *restrict shared, float *restrict gradient) {
    int channels = o->channels / o->towers;
    float factor = 2 * BETA * o->alpha;
    squares(o, row, padded);
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict square = padded + strip * (channels + 2 * REACH);
        float *restrict share = shared + strip * (channels + 2 * REACH) + REACH;
        float *restrict g = gradient + strip * channels;
        for (int c = 0; c < channels; c++) {
            float root = inverse_fourth_root(K + o->alpha * window_sum(square + c)), second = root * root;
            g[c] *= second * root;
            share[c] = g[c] * a[c] * (second * second);
        }
    }
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict share = shared + strip * (channels + 2 * REACH);
        float *restrict g = gradient + strip * channels;
        for (int c = 0; c < channels; c++) {
            float result = g[c] - factor * a[c] * window_sum(share + c);
            g[c] = o->relu_first && !(a[c] > 0) ? 0.0f : result;
        }
    }
}

/* Of a row, the sum over five neighbouring pixels of `a`, or of its squares; those beyond the edge count as 0. */
INLINE void sum_across(const Options *o, const float *restrict a, int squared, float *restrict sums) {
    int channels = o->channels;
    for (int w = 0; w < o->width; w++) {
        float *restrict to = sums + w * channels;
        memset(to, 0, channels * sizeof *to);
        for (int v = w < REACH ? 0 : w - REACH; v <= w + REACH && v < o->width; v++) {
            const float *restrict from = a + v * channels;
            for (int c = 0; c < channels; c++) to[c] += squared ? from[c] * from[c] : from[c];
        }
    }
}

/* Sums down the rows h-2 to h+2 of a ring of five. */
INLINE void sum_down(const Options *o, const float *ring, int h, float *restrict sums) {
    int count = o->width * o->channels;
    memset(sums, 0, count * sizeof *sums);
    for (int r = h < REACH ? 0 : h - REACH; r <= h + REACH && r < o->height; r++) {
        const float *restrict from = ring + r % WINDOW * count;
        for (int i = 0; i < count; i++) sums[i] += from[i];
    }
}

/* A row of maxima of three rows, and their places. A ReLU that comes after cuts off here; before, it left none. */
INLINE void pool(const Options *o, float *const rows[3], float *restrict maxima, uint8_t *restrict places) {
    int channels = o->channels;
    for (int j = 0; j < (o->width - 1) / 2; j++) {
        const float *pixels[9];
        for (int i = 0; i < 9; i++) pixels[i] = rows[i / 3] + (2 * j + i % 3) * channels;
        float *restrict maximum = maxima + j * channels;
        uint8_t *restrict where = places + j * channels;
        for (int c = 0; c < channels; c++) {
            float best = pixels[0][c];
            int place = 0;
            for (int i = 1; i < 9; i++) {
                float b = pixels[i][c];
                int greater = (b > best) | (b != b);
                best = greater ? b : best;
                place = greater ? i : place;
            }
            int cut = best < 0;
            maximum[c] = cut ? 0.0f : best;
            where[c] = cut ? NOWHERE : place;
        }
    }
}

/* What comes to row h of the normalised maps from the rows of windows that it is in. */
INLINE void pool_backward(const Options *o, const void *grad, const uint8_t *places, int h, float *restrict here,
                          float *restrict gradient) {
    int channels = o->channels, rows = (o->height - 1) / 2, columns = (o->width - 1) / 2;
    memset(gradient, 0, o->width * channels * sizeof *gradient);
    for (int y = h % 2; y < 3; y += 2) {
        int i = (h - y) / 2;
        if (h < y || i >= rows) continue;
        load(o, grad, (size_t)i * columns * channels, here, columns * channels);
        for (int j = 0; j < columns; j++)
            for (int z = 0; z < 3; z++) {
                const uint8_t *restrict place = places + (i * columns + j) * channels;
                const float *restrict from = here + j * channels;
                float *restrict to = gradient + (2 * j + z) * channels;
                for (int c = 0; c < channels; c++) to[c] += place[c] == 3 * y + z ? from[c] : 0.0f;
            }
    }
}

/* How many floats a thread works with: fifteen rows and more, of which two have ends at each tower. */
static size_t scratch(const Options *o) {
    size_t row = (size_t)o->width * o->channels, padded = row + (size_t)o->width * o->towers * 2 * REACH;
    return (o->spatial_norm ? 4 * WINDOW + 4 : 4) * row + 2 * padded;
}

EACH_PROCESSOR
static void forward_image(const Options *o, const void *x, void *y, uint8_t *places, float *memory) {
    int count = o->width * o->channels, rows = (o->height - 1) / 2, pooled = (o->width - 1) / 2 * o->channels;
    float *row = memory, *ready = row + count, *padded = ready + 3 * count;
    float *once = padded + count + o->width * o->towers * 2 * REACH, *across = once + WINDOW * count;
    memset(padded, 0, (count + o->width * o->towers * 2 * REACH) * sizeof *padded);
    int lag = o->spatial_norm ? REACH : 0;
    for (int h = 0; h < o->height + lag; h++) {
        int done = h - lag;
        float *normalised = ready + (done + 3) % 3 * count;
        if (h < o->height) {
            read_row(o, x, h, row);
            normalise(o, row, padded, lag ? once + h % WINDOW * count : normalised);
            if (lag) sum_across(o, once + h % WINDOW * count, 1, across + h % WINDOW * count);
        }
        if (done < 0) continue;
        if (lag) {
            const float *b = once + done % WINDOW * count;
            sum_down(o, across, done, row);
            for (int i = 0; i < count; i++) {
                float root = inverse_fourth_root(SPATIAL_K + SPATIAL_ALPHA * row[i]);
                normalised[i] = b[i] * (root * root * root);
            }
            round_row(o, normalised);
        }
        if (done % 2 == 0 && done > 0 && done / 2 <= rows) {
            float *window[3] = {ready + (done + 1) % 3 * count, ready + (done + 2) % 3 * count, normalised};
            size_t first = (size_t)(done / 2 - 1) * pooled;
            pool(o, window, row, places + first);
            store(o, row, y, first, pooled);
        }
    }
}

EACH_PROCESSOR
static void backward_image(const Options *o, const void *grad, const uint8_t *places, const void *x, void *result,
                           float *memory) {
    int count = o->width * o->channels, ends = o->width * o->towers * 2 * REACH;
    float *row = memory, *gradient = row + count, *padded = gradient + count, *shared = padded + count + ends;
    float *here = shared + count + ends, *sums = here + count;
    float *once = sums + count, *across = once + WINDOW * count, *direct = across + WINDOW * count;
    float *across_shared = direct + WINDOW * count;
    memset(padded, 0, 2 * (count + ends) * sizeof *padded);
    if (!o->spatial_norm) {
        for (int h = 0; h < o->height; h++) {
            read_row(o, x, h, row);
            pool_backward(o, grad, places, h, here, gradient);
            normalise_backward(o, row, padded, shared, gradient);
            store(o, gradient, result, (size_t)h * count, count);
        }
        return;
    }
    for (int h = 0; h < o->height + 2 * REACH; h++) {
        if (h < o->height) {
            float *b = once + h % WINDOW * count;
            read_row(o, x, h, row);
            normalise(o, row, padded, b);
            sum_across(o, b, 1, across + h % WINDOW * count);
        }
        int middle = h - REACH, last = h - 2 * REACH;
        if (middle >= 0 && middle < o->height) {
            const float *restrict b = once + middle % WINDOW * count;
            float *restrict g = direct + middle % WINDOW * count;
            sum_down(o, across, middle, sums);
            pool_backward(o, grad, places, middle, here, g);
            for (int i = 0; i < count; i++) {
                float root = inverse_fourth_root(SPATIAL_K + SPATIAL_ALPHA * sums[i]), second = root * root;
                g[i] *= second * root;
                sums[i] = g[i] * b[i] * (second * second);
            }
            sum_across(o, sums, 0, across_shared + middle % WINDOW * count);
        }
        if (last >= 0) {
            const float *restrict b = once + last % WINDOW * count, *restrict g = direct + last % WINDOW * count;
            sum_down(o, across_shared, last, sums);
            for (int i = 0; i < count; i++) gradient[i] = g[i] - 2 * BETA * SPATIAL_ALPHA * b[i] * sums[i];
            read_row(o, x, last, row);
            normalise_backward(o, row, padded, shared, gradient);
            store(o, gradient, result, (size_t)last * count, count);
        }
    }
}

/* All images: forward from x to y, or with a gradient of y backward from it to that of x. Which image is whose does
 * not matter to the result, so that it is the same in any number of threads. Returns 1 where memory is lacking. */
int normalise_and_pool(const Options *o, const char *x, char *y, uint8_t *places, char *gradient, int backward,
                       int threads) {
    size_t size = o->bf16 ? 2 : 4, image = (size_t)o->height * o->width * o->channels;
    size_t pooled = (size_t)((o->height - 1) / 2) * ((o->width - 1) / 2) * o->channels;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = malloc(scratch(o) * sizeof *memory);
        failed = memory == NULL;
#pragma omp for schedule(static)
        for (int n = 0; n < o->images; n++) {
            const char *from = x + n * image * size;
            char *to = y + n * pooled * size;
            if (memory && backward)
                backward_image(o, to, places + n * pooled, from, gradient + n * image * size, memory);
            else if (memory)
                forward_image(o, from, to, places + n * pooled, memory);
        }
        free(memory);
    }
    return failed;
}
