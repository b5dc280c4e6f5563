/* Crop or resize decoded images, mirror them, subtract a mean and divide, in one pass per image on a CPU.
 *
 * Inputs are uint8 RGB in HWC order, outputs fp32 in HWC order. `resize` and `crop_mirror_normalize` in graph.py define
 * the result. Resized values are rounded to whole levels, as they are there.
 */
#include <math.h>
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

typedef float Pixel __attribute__((vector_size(16))); /* red, green, blue and an unused value */

/* pixels: the first pixel of the part of an image that is used, of height × width pixels in rows `stride` bytes apart.
 * Parts that do not have the size of the crop are resized. */
typedef struct {
    const uint8_t *pixels;
    float *output;
    int64_t stride;
    int32_t height, width, mirror;
    float mean[3], divisor[3];
} Image;

/* The weights with which values along one side are added up: `taps` for each output, from the value `first` on. */
typedef struct {
    int taps;
    int *first;
    float *weights;
} Filter;

/* Return the number of values that an output depends on: those nearer to its centre than 1, in units of the larger of
 * the two distances between values, of the input and of the output. */
static int count_taps(int from, int to) {
    int taps = from > to ? (2 * from + to - 1) / to : 2;
    return taps < from ? taps : from;
}

/* Return the bytes of a filter. */
static size_t filter_size(int taps, int outputs) { return (size_t)outputs * (taps * sizeof(float) + sizeof(int)); }

/* Make a triangular filter that resizes `from` values to `to`, in reverse order if `mirror` is set. Values beyond the
 * ends do not count. */
static Filter make_filter(char *memory, int taps, int from, int to, int mirror) {
    Filter f = {taps, (int *)memory, (float *)(memory + to * sizeof(int))};
    double scale = (double)from / to, radius = scale > 1 ? scale : 1;
    for (int i = 0; i < to; i++) {
        int output = mirror ? to - 1 - i : i;
        double centre = (i + 0.5) * scale - 0.5, sum = 0;
        int first = (int)ceil(centre - radius), last = from - taps;
        first = first < 0 ? 0 : first > last ? last : first;
        float *weights = f.weights + (size_t)output * taps;
        for (int k = 0; k < taps; k++) {
            double distance = fabs(first + k - centre) / radius;
            weights[k] = distance < 1 ? 1 - distance : 0;
            sum += weights[k];
        }
        for (int k = 0; k < taps; k++) weights[k] /= sum;
        f.first[output] = first;
    }
    return f;
}

/* Round to the nearest whole number, ties to even: at 1.5 × 2^23, the distance between floats is 1. */
INLINE Pixel rounded(Pixel value) {
    const float large = 12582912;
    return value + large - large;
}

/* Resize a row, of which `row` holds the RGB values and one more. */
INLINE void resize_row(const float *restrict row, Filter f, const int taps, int width, Pixel *restrict resized) {
    for (int x = 0; x < width; x++) {
        const float *from = row + 3 * f.first[x], *weights = f.weights + (size_t)x * taps;
        Pixel sum, pixel;
        memcpy(&pixel, from, sizeof pixel);
        sum = pixel * weights[0];
        for (int k = 1; k < taps; k++) {
            memcpy(&pixel, from + 3 * k, sizeof pixel);
            sum += pixel * weights[k];
        }
        resized[x] = sum;
    }
}

/* Resize a part to side × side pixels. Rows are resized across when they are first needed, and kept in a ring of as
 * many rows as an output row depends on. Returns 1 if memory runs out. */
EACH_INSTRUCTION_SET
static int resize_part(const Image *image, int side) {
    int width = image->width, height = image->height;
    int across_taps = count_taps(width, side), down_taps = count_taps(height, side);
    size_t across_size = filter_size(across_taps, side), down_size = filter_size(down_taps, side);
    size_t pixels = (size_t)(down_taps + 1) * side, values = 3 * width + 1;
    char *memory = malloc(pixels * sizeof(Pixel) + across_size + down_size + values * sizeof(float));
    if (memory == NULL) return 1;
    Pixel *sums = (Pixel *)memory, *ring = sums + side;
    char *filters = (char *)(sums + pixels);
    Filter across = make_filter(filters, across_taps, width, side, image->mirror);
    Filter down = make_filter(filters + across_size, down_taps, height, side, 0);
    float *row = (float *)(filters + across_size + down_size);
    row[3 * width] = 0;
    Pixel mean = {image->mean[0], image->mean[1], image->mean[2]};
    Pixel factor = {1 / image->divisor[0], 1 / image->divisor[1], 1 / image->divisor[2]};
    for (int y = 0, resized = 0; y < side; y++) {
        for (; resized < down.first[y] + down_taps; resized++) {
            Pixel *to = ring + (size_t)(resized % down_taps) * side;
            const uint8_t *restrict bytes = image->pixels + resized * image->stride;
            for (int i = 0; i < 3 * width; i++) row[i] = bytes[i];
            if (across_taps == 2)
                resize_row(row, across, 2, side, to); /* unrolled */
            else
                resize_row(row, across, across_taps, side, to);
        }
        for (int k = 0; k < down_taps; k++) {
            const Pixel *restrict from = ring + (size_t)((down.first[y] + k) % down_taps) * side;
            float weight = down.weights[(size_t)y * down_taps + k];
            for (int x = 0; x < side; x++) sums[x] = k ? sums[x] + from[x] * weight : from[x] * weight;
        }
        float *output = image->output + (size_t)y * side * 3;
        for (int x = 0; x < side; x++) {
            Pixel result = (rounded(sums[x]) - mean) * factor;
            /* The fourth value is overwritten by the next pixel, but would be beyond the end of the row. */
            if (x < side - 1)
                memcpy(output + 3 * x, &result, sizeof result);
            else
                memcpy(output + 3 * x, &result, 3 * sizeof(float));
        }
    }
    free(memory);
    return 0;
}

/* Copy a part that has the size of the crop. Returns 1 if memory runs out. */
EACH_INSTRUCTION_SET
static int copy_part(const Image *image, int side) {
    int count = 3 * side;
    float *means = malloc(count * (2 * sizeof(float) + 1)), *factors = means + count;
    uint8_t *mirrored = (uint8_t *)(factors + count);
    if (means == NULL) return 1;
    for (int i = 0; i < count; i++) {
        means[i] = image->mean[i % 3];
        factors[i] = 1 / image->divisor[i % 3];
    }
    for (int y = 0; y < side; y++) {
        const uint8_t *restrict row = image->pixels + y * image->stride;
        float *restrict output = image->output + (size_t)y * count;
        if (image->mirror) {
            for (int x = 0; x < side; x++) memcpy(mirrored + 3 * x, row + 3 * (side - 1 - x), 3);
            row = mirrored;
        }
        for (int i = 0; i < count; i++) output[i] = (row[i] - means[i]) * factors[i];
    }
    free(means);
    return 0;
}

/* Process images. Returns 1 if memory runs out. */
int crop_images(const Image *images, int count, int side) {
    for (const Image *image = images; image < images + count; image++) {
        int is_copied = image->height == side && image->width == side;
        if (is_copied ? copy_part(image, side) : resize_part(image, side)) return 1;
    }
    return 0;
}
