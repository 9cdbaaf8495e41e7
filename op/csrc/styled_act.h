/* leaky_relu(x * factor + noise * strength + bias) in channels-last, and its derivative with all that is summed for the
 * gradients of the factors: one pass over the activations each.
 *
 * A block takes some of the pixels of one image, and each of its threads one pack of V channels of every rows-th of
 * them, so that factors and bias stay in registers and the sums over pixels do, too. What a block has summed is written
 * out, not added up by atomics: a gradient is the same in every run. */
#pragma once

#include "portable.h"

enum { STYLED_THREADS = 256, STYLED_PACKS = 4096, STYLED_PIXELS = 1024 };

template <class T> struct styled_args {
    const T *x;               /* [images, pixels, channels]; of the derivative: null if the factors need no gradient */
    const T *factor;          /* [images, channels] */
    const float *noise;       /* [images or 1, pixels, channels or 1], or null */
    const float *strength;    /* [1] */
    const float *bias;        /* [channels] */
    const T *output, *grad;   /* of the derivative: what the forward pass gave, and the gradient by it */
    T *y;                     /* the output; of the derivative: the gradient by x */
    float *noise_grad;        /* null, or by the noise: [images, pixels, channels or 1] */
    float *sums;              /* null, or of each block [2, channels]: of gradient * x and of the gradient */
    float *strength_sums;     /* null, or of each block [packs]: of gradient * noise */
    int32_t pixels, channels;
    int64_t noise_image;      /* steps in noise: 0 for one map for all images */
    int32_t noise_pixel;      /* 1 for one map for all channels */
    float slope;
};

/* A block's memory, of the derivative alone. */
struct styled_memory {
    float by_thread[STYLED_THREADS * 16];                   /* [threads, 2, V] */
    float by_pack[STYLED_PACKS + STYLED_PIXELS];            /* [pixels, packs + 1]: a column more, for the banks */
    float strength[STYLED_THREADS];
};

/* What block and thread are about. packs divides STYLED_THREADS. */
template <class T, int V> struct styled_place {
    int32_t packs, rows, channel, start, count, row;
    int64_t image;
    static HD int32_t piece(int32_t packs) {                /* pixels of a block */
        return STYLED_PACKS / packs < STYLED_PIXELS ? STYLED_PACKS / packs : STYLED_PIXELS;
    }
    static HD int32_t pieces(int32_t pixels, int32_t channels) {
        return (pixels + piece(channels / V) - 1) / piece(channels / V);
    }
    HD styled_place(const styled_args<T> &a, int64_t block, int32_t thread) {
        packs = a.channels / V;
        rows = STYLED_THREADS / packs;
        channel = thread % packs * V;
        row = thread / packs;
        int32_t all = pieces(a.pixels, a.channels);
        image = block / all;
        start = (int32_t)(block % all) * piece(packs);
        count = a.pixels - start < piece(packs) ? a.pixels - start : piece(packs);
    }
};

template <int V> HD void load_floats(const float *from, float (&to)[V]) {
    UNROLL for (int j = 0; j < V; j += 4) {
        pack<float, 4> four = *(const pack<float, 4> *)(from + j);
        UNROLL for (int k = 0; k < 4; k++) to[j + k] = four.v[k];
    }
}

/* The noise of pixel `at` of the image, for each channel of the pack. */
template <class T, int V> HD void load_noise(const styled_args<T> &a, int64_t image, int32_t at, int32_t channel,
                                             float (&noise)[V]) {
    const float *here = a.noise + image * a.noise_image + (int64_t)at * a.noise_pixel;
    if (a.noise_pixel == 1) {
        float one = *here;
        UNROLL for (int j = 0; j < V; j++) noise[j] = one;
    } else {
        load_floats<V>(here + channel, noise);
    }
}

template <class T, int V> HD void styled_forward(const styled_args<T> &a, int64_t block, int32_t thread) {
    const styled_place<T, V> at(a, block, thread);
    const int64_t offset = (at.image * a.pixels + at.start) * a.channels + at.channel;
    const T *RESTRICT x = a.x + offset;
    T *RESTRICT y = a.y + offset;
    const float strength = a.noise ? *a.strength : 0;
    pack<T, V> factor = *(const pack<T, V> *)(a.factor + at.image * a.channels + at.channel);
    float bias[V];
    load_floats<V>(a.bias + at.channel, bias);
    for (int32_t p = at.row; p < at.count; p += at.rows) {
        pack<T, V> in = *(const pack<T, V> *)(x + p * a.channels), out;
        float noise[V];
        UNROLL for (int j = 0; j < V; j++) noise[j] = 0;
        if (a.noise) load_noise<T, V>(a, at.image, at.start + p, at.channel, noise);
        UNROLL for (int j = 0; j < V; j++) {
            float value = widen(in.v[j]) * widen(factor.v[j]) + noise[j] * strength + bias[j];
            out.v[j] = narrow<T>(value > 0 ? value : value * a.slope);
        }
        *(pack<T, V> *)(y + p * a.channels) = out;
    }
}

template <class T, int V> HD void styled_gradient(const styled_args<T> &a, styled_memory &m, int64_t block,
                                                  int32_t thread) {
    const styled_place<T, V> at(a, block, thread);
    const int64_t offset = (at.image * a.pixels + at.start) * a.channels + at.channel;
    const T *RESTRICT x = a.x ? a.x + offset : nullptr, *RESTRICT output = a.output + offset,
            *RESTRICT grad = a.grad + offset;
    T *RESTRICT y = a.y + offset;
    const float strength = a.noise ? *a.strength : 0;
    pack<T, V> factor = *(const pack<T, V> *)(a.factor + at.image * a.channels + at.channel);
    float sum_x[V], sum_one[V], sum_noise = 0;
    UNROLL for (int j = 0; j < V; j++) sum_x[j] = sum_one[j] = 0;
    for (int32_t p = at.row; p < at.count; p += at.rows) {
        pack<T, V> above = *(const pack<T, V> *)(grad + p * a.channels);
        pack<T, V> sign = *(const pack<T, V> *)(output + p * a.channels), in, out;
        if (x) in = *(const pack<T, V> *)(x + p * a.channels);
        float d[V], all = 0;
        UNROLL for (int j = 0; j < V; j++) {
            d[j] = widen(above.v[j]) * (widen(sign.v[j]) > 0 ? 1 : a.slope);
            out.v[j] = narrow<T>(d[j] * widen(factor.v[j]));
            sum_one[j] += d[j];
            if (x) sum_x[j] += d[j] * widen(in.v[j]);
            all += d[j];
        }
        *(pack<T, V> *)(y + p * a.channels) = out;
        if (a.strength_sums) {
            float noise[V];
            load_noise<T, V>(a, at.image, at.start + p, at.channel, noise);
            UNROLL for (int j = 0; j < V; j++) sum_noise += d[j] * noise[j];
        }
        if (a.noise_grad && a.noise_pixel == 1) {
            m.by_pack[p * (at.packs + 1) + at.channel / V] = all * strength;
        } else if (a.noise_grad) {
            float *into = a.noise_grad + offset + p * a.channels;
            UNROLL for (int j = 0; j < V; j += 4) {
                pack<float, 4> four;
                UNROLL for (int k = 0; k < 4; k++) four.v[k] = d[j + k] * strength;
                *(pack<float, 4> *)(into + j) = four;
            }
        }
    }
    UNROLL for (int j = 0; j < V; j++) {
        m.by_thread[thread * 2 * V + j] = sum_x[j];
        m.by_thread[thread * 2 * V + V + j] = sum_one[j];
    }
    m.strength[thread] = sum_noise;
}

/* After a barrier: what the block's threads have summed, added up. */
template <class T, int V> HD void styled_sums(const styled_args<T> &a, const styled_memory &m, int64_t block,
                                              int32_t thread) {
    const styled_place<T, V> at(a, block, thread);
    if (a.sums)
        for (int32_t i = thread; i < 2 * a.channels; i += STYLED_THREADS) {
            int32_t which = i / a.channels, channel = i % a.channels;
            float sum = 0;
            for (int32_t row = 0; row < at.rows; row++)
                sum += m.by_thread[((row * at.packs + channel / V) * 2 + which) * V + channel % V];
            a.sums[block * 2 * a.channels + i] = sum;
        }
    if (a.strength_sums && thread < at.packs) {
        float sum = 0;
        for (int32_t row = 0; row < at.rows; row++) sum += m.strength[row * at.packs + thread];
        a.strength_sums[block * at.packs + thread] = sum;
    }
    if (a.noise_grad && a.noise_pixel == 1)
        for (int32_t p = thread; p < at.count; p += STYLED_THREADS) {
            float sum = 0;
            for (int32_t k = 0; k < at.packs; k++) sum += m.by_pack[p * (at.packs + 1) + k];
            a.noise_grad[at.image * a.pixels + at.start + p] = sum;
        }
}
