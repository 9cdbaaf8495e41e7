/* The passes between two convolutions of a network as one, in bfloat16 and channels-last, for op/fused.py. Plain C.
 *
 * Every step rounds to bfloat16 where PyTorch's separate passes do, so that the results are the same to the bit.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* To the nearest, halves to even. NaN stays NaN: those that arithmetic makes have zeros in their lower bits. */
static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float to_bf16(float value) { return wide(narrow(value)); }

static inline bf16 leaky_relu(float x, float slope) { return narrow(x > 0 ? x : x * slope); }

/* out = leaky_relu(bias + gain * x); x, out [rows, channels], bias [channels] */
void bias_act(const bf16 *restrict x, const bf16 *restrict bias, bf16 *restrict out, int64_t rows, int64_t channels,
              float gain, float slope) {
    for (int64_t r = 0; r < rows; r++, x += channels, out += channels)
        for (int64_t c = 0; c < channels; c++)
            out[c] = leaky_relu(to_bf16(fmaf(wide(x[c]), gain, wide(bias[c]))), slope);
}

/* out = leaky_relu(y * factor + noise * strength + bias); y, out [images, pixels, channels], factor [images, channels],
 * bias [channels]; noise float [images or 1, pixels, channels or 1], by its steps, or none. */
void styled(const bf16 *restrict y, const bf16 *restrict factor, const float *restrict noise,
            const bf16 *restrict bias, bf16 *restrict out, int64_t images, int64_t pixels, int64_t channels,
            int64_t noise_image, int64_t noise_pixel, float strength, float slope) {
    for (int64_t i = 0; i < images; i++, factor += channels) {
        const float *n = noise ? noise + i * noise_image : 0;
        for (int64_t p = 0; p < pixels; p++, y += channels, out += channels) {
            if (!n) {
                for (int64_t c = 0; c < channels; c++)
                    out[c] = leaky_relu(to_bf16(to_bf16(wide(y[c]) * wide(factor[c])) + wide(bias[c])), slope);
                continue;
            }
            if (noise_pixel == 1) {
                float one = to_bf16(*n * strength);
                for (int64_t c = 0; c < channels; c++) {
                    float x = to_bf16(to_bf16(wide(y[c]) * wide(factor[c])) + one);
                    out[c] = leaky_relu(to_bf16(x + wide(bias[c])), slope);
                }
            } else {
                for (int64_t c = 0; c < channels; c++) {
                    float x = to_bf16(to_bf16(wide(y[c]) * wide(factor[c])) + to_bf16(n[c] * strength));
                    out[c] = leaky_relu(to_bf16(x + wide(bias[c])), slope);
                }
            }
            n += noise_pixel;
        }
    }
}

/* out = (a + b) * scale */
void scaled_sum(const bf16 *restrict a, const bf16 *restrict b, bf16 *restrict out, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i++) out[i] = narrow(to_bf16(wide(a[i]) + wide(b[i])) * scale);
}

/* out = x + addend, in float; out [images, pixels, channels], addend [pixels]; x of the same shape, `step` from pixel to
 * pixel and `image_step` from image to image */
void raised(const bf16 *restrict x, const float *restrict addend, float *restrict out, int64_t images, int64_t pixels,
            int64_t channels, int64_t image_step, int64_t step) {
    for (int64_t i = 0; i < images; i++)
        for (int64_t p = 0; p < pixels; p++, out += channels) {
            const bf16 *here = x + i * image_step + p * step;
            for (int64_t c = 0; c < channels; c++) out[c] = addend[p] + wide(here[c]);
        }
}
