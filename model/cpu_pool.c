/* Compute ReLU, response normalisation and 3x3 max-pooling with stride 2 in one pass over NHWC data on a CPU.
 *
 * Inputs are fp32 or bf16; arithmetic is in fp32. Only the input and one byte per output are saved for the backward
 * pass: the index of the maximum in its window. Each image is processed by one thread, a few rows at a time, which stay
 * in the cache. `reference_normalise_and_pool` in fused.py defines the result. As in the reference, normalised values
 * are rounded to the input's type before they are compared, so both choose the same maximum. NaN stays NaN.
 *
 * The loops run over neighbouring channels without branches, so that the compiler vectorises them.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A version of each function is compiled for each of these instruction sets, and the dynamic loader chooses one. All
 * give bitwise the same results, because fused multiply-adds are disabled. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_INSTRUCTION_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_INSTRUCTION_SET
#endif
#define INLINE static inline __attribute__((always_inline))

#define K 2.0f
#define BETA 0.75f
#define SPATIAL_K 1.0f
#define SPATIAL_ALPHA (1e-3f / 25) /* factor on the sum */

enum { WINDOW = 5, RADIUS = 2 };
enum { NO_MAXIMUM = 9 }; /* the index in a window whose maximum the ReLU cut off */

typedef struct {
    int images, height, width, channels, towers;
    int bf16, relu_first, spatial_norm;
    float alpha; /* factor on the sum of squares */
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

/* Convert to bf16, rounded to nearest, ties to even. */
INLINE uint32_t bf16_bits(float value) {
    uint32_t bits = as_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (value == value ? rounded : bits | 0x400000) >> 16;
}

/* Load `count` values as fp32. */
INLINE void load(const Options *o, const void *source, size_t first, float *restrict row, int count) {
    if (o->bf16) {
        const uint16_t *restrict from = (const uint16_t *)source + first;
        for (int i = 0; i < count; i++) row[i] = as_float((uint32_t)from[i] << 16);
    } else {
        memcpy(row, (const float *)source + first, count * sizeof *row);
    }
}

/* Store `count` values in the input's type. */
INLINE void store(const Options *o, const float *restrict row, void *target, size_t first, int count) {
    if (o->bf16) {
        uint16_t *restrict to = (uint16_t *)target + first;
        for (int i = 0; i < count; i++) to[i] = bf16_bits(row[i]);
    } else {
        memcpy((float *)target + first, row, count * sizeof *row);
    }
}

/* Compute d^-1/4 by Newton's method, starting from an estimate that divides the exponent by -4; 0 for infinity. */
INLINE float inverse_fourth_root(float d) {
    float y = as_float(0x4f58cae5 - (as_bits(d) >> 2));
    for (int i = 0; i < 3; i++) y *= 1.25f - 0.25f * (d * (y * y)) * (y * y);
    return d > 3.402823466e38f ? 0.0f : y;
}

/* Write the squares of `row` between the zeros that pad both ends of each tower. */
INLINE void squares(const Options *o, const float *restrict row, float *restrict padded) {
    int channels = o->channels / o->towers;
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        float *restrict to = padded + strip * (channels + 2 * RADIUS) + RADIUS;
        for (int c = 0; c < channels; c++) to[c] = a[c] * a[c];
    }
}

INLINE float window_sum(const float *first) { return first[0] + first[1] + first[2] + first[3] + first[4]; }

/* Load row h, and apply the ReLU if it comes first. */
INLINE void read_row(const Options *o, const void *x, int h, float *restrict row) {
    int count = o->width * o->channels;
    load(o, x, (size_t)h * count, row, count);
    if (o->relu_first)
        for (int i = 0; i < count; i++) row[i] = row[i] < 0 ? 0.0f : row[i];
}

/* Round a row to the input's type. */
INLINE void round_row(const Options *o, float *restrict row) {
    if (o->bf16)
        for (int i = 0; i < o->width * o->channels; i++) row[i] = as_float(bf16_bits(row[i]) << 16);
}

/* Normalise across channels: b = a d^-3/4 with d = k + alpha * the sum of a^2 over channels. */
INLINE void normalise(const Options *o, const float *restrict row, float *restrict padded, float *restrict result) {
    int channels = o->channels / o->towers;
    squares(o, row, padded);
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict square = padded + strip * (channels + 2 * RADIUS);
        float *restrict b = result + strip * channels;
        for (int c = 0; c < channels; c++) {
            float root = inverse_fourth_root(K + o->alpha * window_sum(square + c));
            b[c] = a[c] * (root * root * root);
        }
    }
    round_row(o, result);
}

/* Replace the gradient g of b with the gradient of a: g d^-3/4 - 2 alpha beta a * the sum of g a d^-7/4. */
INLINE void normalise_backward(const Options *o, const float *restrict row, float *restrict padded,
                               float *restrict shared, float *restrict gradient) {
    int channels = o->channels / o->towers;
    float factor = 2 * BETA * o->alpha;
    squares(o, row, padded);
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict square = padded + strip * (channels + 2 * RADIUS);
        float *restrict share = shared + strip * (channels + 2 * RADIUS) + RADIUS;
        float *restrict g = gradient + strip * channels;
        for (int c = 0; c < channels; c++) {
            float root = inverse_fourth_root(K + o->alpha * window_sum(square + c)), second = root * root;
            g[c] *= second * root;
            share[c] = g[c] * a[c] * (second * second);
        }
    }
    for (int strip = 0; strip < o->width * o->towers; strip++) {
        const float *restrict a = row + strip * channels;
        const float *restrict share = shared + strip * (channels + 2 * RADIUS);
        float *restrict g = gradient + strip * channels;
        for (int c = 0; c < channels; c++) {
            float result = g[c] - factor * a[c] * window_sum(share + c);
            g[c] = o->relu_first && !(a[c] > 0) ? 0.0f : result;
        }
    }
}

/* Sum `a`, or its squares, over five neighbouring pixels of a row; pixels beyond the edge count as 0. */
INLINE void sum_across(const Options *o, const float *restrict a, int squared, float *restrict sums) {
    int channels = o->channels;
    for (int w = 0; w < o->width; w++) {
        float *restrict to = sums + w * channels;
        memset(to, 0, channels * sizeof *to);
        for (int v = w < RADIUS ? 0 : w - RADIUS; v <= w + RADIUS && v < o->width; v++) {
            const float *restrict from = a + v * channels;
            for (int c = 0; c < channels; c++) to[c] += squared ? from[c] * from[c] : from[c];
        }
    }
}

/* Sum over the rows h-2 to h+2, which a ring buffer of five rows holds; rows beyond the edge count as 0. */
INLINE void sum_down(const Options *o, const float *ring, int h, float *restrict sums) {
    int count = o->width * o->channels;
    memset(sums, 0, count * sizeof *sums);
    for (int r = h < RADIUS ? 0 : h - RADIUS; r <= h + RADIUS && r < o->height; r++) {
        const float *restrict from = ring + r % WINDOW * count;
        for (int i = 0; i < count; i++) sums[i] += from[i];
    }
}

/* Pool three rows to one row of maxima and their indices. This also applies a ReLU that comes last; if the ReLU came
 * first, there are no negative values. */
INLINE void pool(const Options *o, float *const rows[3], float *restrict maxima, uint8_t *restrict argmax) {
    int channels = o->channels;
    for (int j = 0; j < (o->width - 1) / 2; j++) {
        const float *pixels[9];
        for (int i = 0; i < 9; i++) pixels[i] = rows[i / 3] + (2 * j + i % 3) * channels;
        float *restrict maximum = maxima + j * channels;
        uint8_t *restrict indices = argmax + j * channels;
        for (int c = 0; c < channels; c++) {
            float best = pixels[0][c];
            int index = 0;
            for (int i = 1; i < 9; i++) {
                float b = pixels[i][c];
                int greater = (b > best) | (b != b);
                best = greater ? b : best;
                index = greater ? i : index;
            }
            int cut = best <= 0; /* the gradient of a ReLU is 0 at 0 */
            maximum[c] = cut ? 0.0f : best;
            indices[c] = cut ? NO_MAXIMUM : index;
        }
    }
}

/* Compute the gradient of row h of the normalised maps from the rows of windows that contain it. */
INLINE void pool_backward(const Options *o, const void *grad, const uint8_t *argmax, int h,
                          float *restrict pooled_gradient, float *restrict gradient) {
    int channels = o->channels, rows = (o->height - 1) / 2, columns = (o->width - 1) / 2;
    memset(gradient, 0, o->width * channels * sizeof *gradient);
    for (int y = h % 2; y < 3; y += 2) {
        int i = (h - y) / 2;
        if (h < y || i >= rows) continue;
        load(o, grad, (size_t)i * columns * channels, pooled_gradient, columns * channels);
        for (int j = 0; j < columns; j++)
            for (int z = 0; z < 3; z++) {
                const uint8_t *restrict index = argmax + (i * columns + j) * channels;
                const float *restrict from = pooled_gradient + j * channels;
                float *restrict to = gradient + (2 * j + z) * channels;
                for (int c = 0; c < channels; c++) to[c] += index[c] == 3 * y + z ? from[c] : 0.0f;
            }
    }
}

/* Return the number of floats in a row that is padded at both ends of each tower. */
INLINE int padded_size(const Options *o) { return o->width * (o->channels + o->towers * 2 * RADIUS); }

/* Return the number of floats in a thread's scratch memory. */
static size_t scratch_size(const Options *o) {
    size_t row = (size_t)o->width * o->channels;
    return (o->spatial_norm ? 4 * WINDOW + 4 : 4) * row + 2 * (size_t)padded_size(o);
}

/* Compute the pooled maps and the indices of one image. With the spatial normalisation, a row is complete only once the
 * two rows below it have been normalised, so the output lags behind the input by two rows. */
EACH_INSTRUCTION_SET
static void forward_image(const Options *o, const void *x, void *y, uint8_t *argmax, float *memory) {
    int count = o->width * o->channels, rows = (o->height - 1) / 2, pooled = (o->width - 1) / 2 * o->channels;
    float *row = memory, *ring = row + count, *padded = ring + 3 * count;
    float *lrn = padded + padded_size(o), *across = lrn + WINDOW * count;
    memset(padded, 0, padded_size(o) * sizeof *padded);
    int lag = o->spatial_norm ? RADIUS : 0;
    for (int h = 0; h < o->height + lag; h++) {
        int out = h - lag;
        float *normalised = ring + (out + 3) % 3 * count;
        if (h < o->height) {
            read_row(o, x, h, row);
            normalise(o, row, padded, lag ? lrn + h % WINDOW * count : normalised);
            if (lag) sum_across(o, lrn + h % WINDOW * count, 1, across + h % WINDOW * count);
        }
        if (out < 0) continue;
        if (lag) {
            const float *b = lrn + out % WINDOW * count;
            sum_down(o, across, out, row);
            for (int i = 0; i < count; i++) {
                float root = inverse_fourth_root(SPATIAL_K + SPATIAL_ALPHA * row[i]);
                normalised[i] = b[i] * (root * root * root);
            }
            round_row(o, normalised);
        }
        if (out % 2 == 0 && out > 0 && out / 2 <= rows) {
            float *window[3] = {ring + (out + 1) % 3 * count, ring + (out + 2) % 3 * count, normalised};
            size_t first = (size_t)(out / 2 - 1) * pooled;
            pool(o, window, row, argmax + first);
            store(o, row, y, first, pooled);
        }
    }
}

/* Compute the gradient of one image. With the spatial normalisation, the gradient lags behind the input by four rows:
 * two for the sums of squares, and two for the sums of the gradient's terms. */
EACH_INSTRUCTION_SET
static void backward_image(const Options *o, const void *grad, const uint8_t *argmax, const void *x, void *result,
                           float *memory) {
    int count = o->width * o->channels;
    float *row = memory, *gradient = row + count, *padded = gradient + count, *shared = padded + padded_size(o);
    float *pooled_gradient = shared + padded_size(o), *sums = pooled_gradient + count;
    float *lrn = sums + count, *across = lrn + WINDOW * count, *direct = across + WINDOW * count;
    float *shared_across = direct + WINDOW * count;
    memset(padded, 0, 2 * padded_size(o) * sizeof *padded);
    if (!o->spatial_norm) {
        for (int h = 0; h < o->height; h++) {
            read_row(o, x, h, row);
            pool_backward(o, grad, argmax, h, pooled_gradient, gradient);
            normalise_backward(o, row, padded, shared, gradient);
            store(o, gradient, result, (size_t)h * count, count);
        }
        return;
    }
    for (int h = 0; h < o->height + 2 * RADIUS; h++) {
        if (h < o->height) {
            float *b = lrn + h % WINDOW * count;
            read_row(o, x, h, row);
            normalise(o, row, padded, b);
            sum_across(o, b, 1, across + h % WINDOW * count);
        }
        int middle = h - RADIUS, last = h - 2 * RADIUS;
        if (middle >= 0 && middle < o->height) {
            const float *restrict b = lrn + middle % WINDOW * count;
            float *restrict g = direct + middle % WINDOW * count;
            sum_down(o, across, middle, sums);
            pool_backward(o, grad, argmax, middle, pooled_gradient, g);
            for (int i = 0; i < count; i++) {
                float root = inverse_fourth_root(SPATIAL_K + SPATIAL_ALPHA * sums[i]), second = root * root;
                g[i] *= second * root;
                sums[i] = g[i] * b[i] * (second * second);
            }
            sum_across(o, sums, 0, shared_across + middle % WINDOW * count);
        }
        if (last >= 0) {
            const float *restrict b = lrn + last % WINDOW * count, *restrict g = direct + last % WINDOW * count;
            sum_down(o, shared_across, last, sums);
            for (int i = 0; i < count; i++) gradient[i] = g[i] - 2 * BETA * SPATIAL_ALPHA * b[i] * sums[i];
            read_row(o, x, last, row);
            normalise_backward(o, row, padded, shared, gradient);
            store(o, gradient, result, (size_t)last * count, count);
        }
    }
}

/* Process all images. Forward: compute y and argmax from x. Backward: compute `gradient`, that of x, from the gradient
 * of y, which the argument y holds. Returns 1 if memory runs out. */
int normalise_and_pool(const Options *o, const char *x, char *y, uint8_t *argmax, char *gradient, int backward,
                       int threads) {
    size_t size = o->bf16 ? 2 : 4, image = (size_t)o->height * o->width * o->channels;
    size_t pooled = (size_t)((o->height - 1) / 2) * ((o->width - 1) / 2) * o->channels;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = malloc(scratch_size(o) * sizeof *memory);
        failed = memory == NULL;
#pragma omp for schedule(static)
        for (int n = 0; n < o->images; n++) {
            const char *from = x + n * image * size;
            char *to = y + n * pooled * size;
            if (memory && backward)
                backward_image(o, to, argmax + n * pooled, from, gradient + n * image * size, memory);
            else if (memory)
                forward_image(o, from, to, argmax + n * pooled, memory);
        }
        free(memory);
    }
    return failed;
}
