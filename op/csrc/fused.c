/* The passes between two convolutions of a network as one, in channels-last, for op/fused.py. Plain C.
 *
 * Values are bfloat16, or float with -DFLOAT. All is computed in float, and rounded once.
 */
#include <stdint.h>
#include <string.h>

#ifdef FLOAT

typedef float value;

static inline float wide(value x) { return x; }

static inline value narrow(float x) { return x; }

#else

typedef uint16_t value;

static inline float wide(value x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* To the nearest, halves to even. NaN stays NaN: those that arithmetic makes have zeros in their lower bits. */
static inline value narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#endif

static inline float leaky_relu(float x, float slope) { return x > 0 ? x : x * slope; }

/* out = leaky_relu(bias + gain * x); x, out [rows, channels], bias [channels] */
void bias_act(const value *restrict x, const value *restrict bias, value *restrict out, int64_t rows, int64_t channels,
              float gain, float slope) {
    for (int64_t r = 0; r < rows; r++, x += channels, out += channels)
        for (int64_t c = 0; c < channels; c++)
            out[c] = narrow(leaky_relu(wide(x[c]) * gain + wide(bias[c]), slope));
}

/* What is added to y * factor before the bias, of one pixel */
enum { NOTHING, ONE, EACH, SUM };

static inline __attribute__((always_inline)) void styled_pixel(
    int kind, int scaled, const value *restrict y, const value *restrict factor, const float *restrict noise,
    const value *restrict more, const value *restrict bias, const value *restrict then, value *restrict out,
    int64_t channels, float strength, float slope) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; c++) {
        float x = wide(y[c]) * wide(factor[c]) + wide(bias[c]);
        if (kind == ONE) x += *noise * strength;
        if (kind == EACH) x += noise[c] * strength;
        if (kind == SUM) x += (*noise + wide(more[c])) * strength;
        x = leaky_relu(x, slope);
        out[c] = narrow(scaled ? x * wide(then[c]) : x);
    }
}

/* out = leaky_relu(y * factor + noise * strength + bias) * then, [images, rows, columns, channels]; factor and then
 * [images, channels], then or none; bias [channels]. y as out or, folded, [images, rows/2, columns/2, 2, 2, channels].
 * noise float, or none, of steps from image to image and pixel to pixel: 0 or 1 channel or all of them; or, with more,
 * [pixels], to which more is added, [images, pixels, channels] in steps of its own. */
void styled(const value *y, const value *factor, const float *noise, const value *more, const value *bias,
            const value *then, value *out, int64_t images, int64_t rows, int64_t columns, int64_t channels,
            int64_t folded, int64_t noise_image, int64_t noise_pixel, int64_t more_image, int64_t more_pixel,
            float strength, float slope) {
    int kind = more ? SUM : !noise ? NOTHING : noise_pixel == 1 ? ONE : EACH;
    for (int64_t i = 0; i < images; i++, factor += channels, then += then ? channels : 0)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++, out += channels) {
                int64_t pixel = r * columns + c, from = i * rows * columns + pixel;
                if (folded) from = 4 * ((i * (rows / 2) + r / 2) * (columns / 2) + c / 2) + 2 * (r % 2) + c % 2;
                const float *n = noise ? noise + i * noise_image + pixel * noise_pixel : 0;
                const value *m = more ? more + i * more_image + pixel * more_pixel : 0;
#define PIXEL(KIND, SCALED) styled_pixel(KIND, SCALED, y + from * channels, factor, n, m, bias, then, out, channels, \
                                         strength, slope)
#define OF_KIND(SCALED) do { \
                    if (kind == NOTHING) PIXEL(NOTHING, SCALED); \
                    else if (kind == ONE) PIXEL(ONE, SCALED); \
                    else if (kind == EACH) PIXEL(EACH, SCALED); \
                    else PIXEL(SUM, SCALED); \
                } while (0)
                if (then) OF_KIND(1);
                else OF_KIND(0);
#undef OF_KIND
#undef PIXEL
            }
}

/* out = (a + b) * scale */
void scaled_sum(const value *restrict a, const value *restrict b, value *restrict out, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i++) out[i] = narrow((wide(a[i]) + wide(b[i])) * scale);
}

/* x twice as wide and high by the filter 1-3-3-1, and beside it other: out [images, 2 rows, 2 columns, channels + others],
 * x [images, rows, columns, channels], other [images, 2 rows, 2 columns, others]; line [columns, channels] is room. */
void enlarged_beside(const value *x, const value *other, value *out, float *restrict line, int64_t images, int64_t rows,
                     int64_t columns, int64_t channels, int64_t others) {
    const int64_t length = columns * channels, step = channels + others;
    for (int64_t i = 0; i < images; i++)
        for (int64_t r = 0; r < 2 * rows; r++) {
            int64_t near = r / 2, far = near + (r % 2 ? 1 : -1);
            const value *restrict a = x + (i * rows + near) * length;
            const value *restrict b = far < 0 || far == rows ? 0 : x + (i * rows + far) * length;
            if (b) {
#pragma GCC ivdep
                for (int64_t k = 0; k < length; k++) line[k] = 0.75f * wide(a[k]) + 0.25f * wide(b[k]);
            } else {
#pragma GCC ivdep
                for (int64_t k = 0; k < length; k++) line[k] = 0.75f * wide(a[k]);
            }
            for (int64_t c = 0; c < 2 * columns; c++, out += step, other += others) {
                int64_t beside = c / 2 + (c % 2 ? 1 : -1);
                const float *restrict n = line + c / 2 * channels;
                const float *restrict f = beside < 0 || beside == columns ? 0 : line + beside * channels;
                if (f) {
#pragma GCC ivdep
                    for (int64_t k = 0; k < channels; k++) out[k] = narrow(0.75f * n[k] + 0.25f * f[k]);
                } else {
#pragma GCC ivdep
                    for (int64_t k = 0; k < channels; k++) out[k] = narrow(0.75f * n[k]);
                }
                memcpy(out + channels, other, others * sizeof *out);
            }
        }
}
