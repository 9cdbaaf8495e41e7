/* Upsampling, filtering and downsampling: one output a thread for any kernel, a register tile of outputs a thread
 * for the 4 x 4 kernels of the networks.
 *
 * A tensor is [planes, height, width, inner]: NCHW has batch * channels planes and inner 1, channels-last has batch
 * planes and inner = channels. Neighbouring threads take neighbouring addresses either way.
 *
 * Row r of the output meets the zero-stuffed rows v = r * down - top + u, u = 0 .. kh - 1, of which row v / up of the
 * input is behind every up-th. The kernel is turned round, as convolution asks, unless `correlate` is set. */
#pragma once

#include "portable.h"

struct upfirdn_shape {
    int64_t planes;
    int32_t in_h, in_w, out_h, out_w, inner;
    int32_t kh, kw, up, down, left, top;
    int32_t correlate;
};

/* Quotient rounded down, of a positive divisor. */
HD int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

template <class A> HD A tap(const upfirdn_shape &s, const A *kernel, int32_t u, int32_t v) {
    return s.correlate ? kernel[u * s.kw + v] : kernel[(s.kh - 1 - u) * s.kw + s.kw - 1 - v];
}

/* Output i of the whole tensor. */
template <class T, class Index>
HD void upfirdn_point(const upfirdn_shape &s, const T *x, const typename accumulator<T>::type *kernel, T *y, Index i) {
    Index rest = i / s.inner;
    Index channel = i - rest * s.inner;
    int32_t column = (int32_t)(rest % s.out_w);
    rest /= s.out_w;
    int32_t row = (int32_t)(rest % s.out_h);
    const T *plane = x + rest / s.out_h * ((Index)s.in_h * s.in_w * s.inner) + channel;
    int32_t top = row * s.down - s.top, left = column * s.down - s.left;
    int32_t first_row = -floor_div(-top, s.up), first_column = -floor_div(-left, s.up);    /* rounded up */
    typename accumulator<T>::type sum = 0;
    for (int32_t r = first_row; r * s.up - top < s.kh; r++)
        for (int32_t c = first_column; c * s.up - left < s.kw; c++)
            if (r >= 0 && r < s.in_h && c >= 0 && c < s.in_w)
                sum += tap(s, kernel, r * s.up - top, c * s.up - left) *
                       widen(plane[((Index)r * s.in_w + c) * s.inner]);
    y[i] = narrow<T>(sum);
}

/* rows[u] * columns[v] in place of the taps; false where the kernel isn't such a product (to rounding). */
HD bool factorise(const float (&taps)[16], float (&rows)[4], float (&columns)[4]) {
    float total = 0, largest = 0;
    UNROLL for (int i = 0; i < 4; i++) rows[i] = columns[i] = 0;
    UNROLL for (int i = 0; i < 16; i++) {
        rows[i / 4] += taps[i];
        columns[i % 4] += taps[i];
        total += taps[i];
        largest = taps[i] > largest ? taps[i] : -taps[i] > largest ? -taps[i] : largest;
    }
    if (total < largest && -total < largest) return false;    /* a derivative: the sums cancel */
    bool product = true;
    UNROLL for (int i = 0; i < 4; i++) columns[i] /= total;
    UNROLL for (int i = 0; i < 16; i++) {
        float off = rows[i / 4] * columns[i % 4] - taps[i];
        product &= off <= 1e-6f * largest && -off <= 1e-6f * largest;
    }
    return product;
}

/* The tile of ROWS x COLUMNS outputs of V channels that one thread keeps in registers. `up` or `down` is 1. Tiles
 * begin where zero-stuffed rows and columns begin with an input's, so that every index below is known to the
 * compiler; outputs that a tile has beyond the edges are left out. */
template <int UP, int DOWN, int ROWS, int COLUMNS> struct tiling {
    enum {
        IN_ROWS = ((ROWS - 1) * DOWN + 3) / UP + 1,
        IN_COLUMNS = ((COLUMNS - 1) * DOWN + 3) / UP + 1
    };
    static HD int32_t shift(int32_t pad) { return pad - floor_div(pad, UP) * UP; }    /* pad modulo UP */
    /* Tile t begins at output t * ROWS - lead(pad): there v = r - pad is a multiple of UP. */
    static HD int32_t lead(int32_t pad) { return shift(pad) == 0 ? 0 : UP - shift(pad); }
    static HD int32_t down_tiles(const upfirdn_shape &s) { return (s.out_h + lead(s.top) + ROWS - 1) / ROWS; }
    static HD int32_t across_tiles(const upfirdn_shape &s) {
        return (s.out_w + lead(s.left) + COLUMNS - 1) / COLUMNS;
    }
};

template <class T, int V, int UP, int DOWN, int ROWS, int COLUMNS, bool PRODUCT>
HD void accumulate(const upfirdn_shape &s, const T *x, const float (&taps)[16], const float (&rows)[4],
                   const float (&columns)[4], int32_t in_row, int32_t in_column, float (&sum)[ROWS][COLUMNS][V]) {
    typedef tiling<UP, DOWN, ROWS, COLUMNS> tiles;
    UNROLL for (int i = 0; i < tiles::IN_ROWS; i++) {
        if (in_row + i < 0 || in_row + i >= s.in_h) continue;
        float in[tiles::IN_COLUMNS][V];
        UNROLL for (int j = 0; j < tiles::IN_COLUMNS; j++) {
            pack<T, V> loaded;
            UNROLL for (int k = 0; k < V; k++) loaded.v[k] = narrow<T>(0);
            if (in_column + j >= 0 && in_column + j < s.in_w)
                loaded = *(const pack<T, V> *)(x + ((in_row + i) * s.in_w + in_column + j) * s.inner);
            UNROLL for (int k = 0; k < V; k++) in[j][k] = widen(loaded.v[k]);
        }
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            float filtered[V];
            UNROLL for (int k = 0; k < V; k++) filtered[k] = 0;
            if (PRODUCT)
                UNROLL for (int j = 0; j < tiles::IN_COLUMNS; j++) {
                    int v = j * UP - c * DOWN;
                    if (v < 0 || v > 3) continue;
                    UNROLL for (int k = 0; k < V; k++) filtered[k] += columns[v] * in[j][k];
                }
            UNROLL for (int r = 0; r < ROWS; r++) {
                int u = i * UP - r * DOWN;
                if (u < 0 || u > 3) continue;
                if (PRODUCT) {
                    UNROLL for (int k = 0; k < V; k++) sum[r][c][k] += rows[u] * filtered[k];
                } else {
                    UNROLL for (int j = 0; j < tiles::IN_COLUMNS; j++) {
                        int v = j * UP - c * DOWN;
                        if (v < 0 || v > 3) continue;
                        UNROLL for (int k = 0; k < V; k++) sum[r][c][k] += taps[u * 4 + v] * in[j][k];
                    }
                }
            }
        }
    }
}

/* Tile `thread` of planes * down_tiles * across_tiles * (inner / V). Offsets within a plane fit in 32 bits. */
template <class T, int V, int UP, int DOWN, int ROWS, int COLUMNS>
HD void upfirdn_tile(const upfirdn_shape &s, const T *x, const float *kernel, T *y, uint32_t thread) {
    typedef tiling<UP, DOWN, ROWS, COLUMNS> tiles;
    uint32_t packs = s.inner / V, across = tiles::across_tiles(s), down = tiles::down_tiles(s);
    uint32_t channel = thread % packs * V;
    thread /= packs;
    int32_t column = (int32_t)(thread % across) * COLUMNS - tiles::lead(s.left);
    thread /= across;
    int32_t row = (int32_t)(thread % down) * ROWS - tiles::lead(s.top);
    int64_t plane = thread / down;
    x += plane * ((int64_t)s.in_h * s.in_w * s.inner) + channel;
    y += plane * ((int64_t)s.out_h * s.out_w * s.inner) + channel;

    float taps[16], rows[4], columns[4], sum[ROWS][COLUMNS][V];
    UNROLL for (int i = 0; i < 16; i++) taps[i] = tap(s, kernel, i / 4, i % 4);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            UNROLL for (int k = 0; k < V; k++) sum[r][c][k] = 0;
    int32_t in_row = floor_div(row * DOWN - s.top, UP), in_column = floor_div(column * DOWN - s.left, UP);    /* exact */
    if (factorise(taps, rows, columns))
        accumulate<T, V, UP, DOWN, ROWS, COLUMNS, true>(s, x, taps, rows, columns, in_row, in_column, sum);
    else
        accumulate<T, V, UP, DOWN, ROWS, COLUMNS, false>(s, x, taps, rows, columns, in_row, in_column, sum);

    UNROLL for (int r = 0; r < ROWS; r++) {
        if (row + r < 0 || row + r >= s.out_h) continue;
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            if (column + c < 0 || column + c >= s.out_w) continue;
            pack<T, V> stored;
            UNROLL for (int k = 0; k < V; k++) stored.v[k] = narrow<T>(sum[r][c][k]);
            *(pack<T, V> *)(y + ((row + r) * s.out_w + column + c) * s.inner) = stored;
        }
    }
}
