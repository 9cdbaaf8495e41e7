/* Convolutions of 3 x 3 by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016), float, channels-last, for op/winograd.py.
 *
 * A tile of 4 x 4 outputs hangs on 6 x 6 inputs. Transformed, the convolution is a product at each of 36 places: of the
 * tiles, [tiles, in], and the weights, [in, out]: a quarter of the multiplications. Plain C with vectors of the CPU's width.
 */
#include <stdint.h>
#include <string.h>

enum { SIDE = 6, PLACES = SIDE * SIDE, OUT = 4, LANES = 8, PANEL = 2 * LANES, GAP = 16 };
#ifdef __AVX512F__
enum { WIDE = 16, ROWS = 12, FEW = 4 };     /* a product sums up ROWS x 2 vectors of WIDE floats: what registers hold; */
#else                                       /* where fewer are left, FEW, by which ROWS and LANES can be divided */
enum { WIDE = 8, ROWS = 6, FEW = 2 };
#endif

typedef float vec __attribute__((vector_size(WIDE * sizeof(float))));

/* The first `lanes`, a constant, of a vector */
static inline __attribute__((always_inline)) vec load_some(const float *from, int lanes) {
    vec v = {0};
    memcpy(&v, from, lanes * sizeof(float));
    return v;
}

static inline __attribute__((always_inline)) void store_some(float *to, vec v, int lanes) {
    memcpy(to, &v, lanes * sizeof(float));
}

static inline vec load(const float *from) { return load_some(from, WIDE); }

static inline void store(float *to, vec v) { store_some(to, v, WIDE); }

/* Six inputs of a row or column as the interpolation points 0, 1, -1, 2, -2 and infinity see them */
static inline void inward(const vec *d, vec *v) {
    vec d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5];
    vec even = d4 - 4 * d2, odd = d3 - 4 * d1, close = d4 - d2, apart = 2 * (d3 - d1);
    v[0] = 4 * d0 - 5 * d2 + d4;
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = close + apart;
    v[4] = close - apart;
    v[5] = 4 * d1 - 5 * d3 + d5;
}

/* Six products of a row or column as four outputs */
static inline void outward(const vec *m, vec *y) {
    vec m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3], m4 = m[4], m5 = m[5];
    vec sum = m1 + m2, difference = m1 - m2, far_sum = m3 + m4, far_difference = m3 - m4;
    y[0] = m0 + sum + far_sum;
    y[1] = difference + 2 * far_difference;
    y[2] = sum + 4 * far_sum;
    y[3] = difference + 8 * far_difference + m5;
}

/* `lanes` channels of the tile whose first output is at row, column of image [rows, columns, in] -> v, its places
 * `apart` floats apart */
static inline __attribute__((always_inline)) void transform_some(const float *image, int64_t rows, int64_t columns,
                                                                 int64_t in, int64_t row, int64_t column, float *v,
                                                                 int64_t apart, int lanes) {
    vec half[PLACES];
    for (int j = 0; j < SIDE; j++) {
        vec d[SIDE], t[SIDE];
        for (int i = 0; i < SIDE; i++) {
            int64_t r = row + i - 1, k = column + j - 1;
            int inside = r >= 0 && r < rows && k >= 0 && k < columns;
            d[i] = inside ? load_some(image + (r * columns + k) * in, lanes) : (vec){0};
        }
        inward(d, t);
        for (int i = 0; i < SIDE; i++) half[SIDE * i + j] = t[i];
    }
    for (int i = 0; i < SIDE; i++) {
        vec t[SIDE];
        inward(half + SIDE * i, t);
        for (int j = 0; j < SIDE; j++) store_some(v + (SIDE * i + j) * apart, t[j], lanes);
    }
}

static void transform_tile(const float *image, int64_t rows, int64_t columns, int64_t in, int64_t row, int64_t column,
                           float *v, int64_t apart) {
    int64_t c = 0;
    for (; c + WIDE <= in; c += WIDE) transform_some(image + c, rows, columns, in, row, column, v + c, apart, WIDE);
    if (c < in) transform_some(image + c, rows, columns, in, row, column, v + c, apart, LANES);
}

static void restore_tile(const float *m, int64_t apart, float *image, int64_t rows, int64_t columns, int64_t out,
                         int64_t row, int64_t column) {
    for (int64_t c = 0; c < out; c += WIDE) {
        vec half[OUT * SIDE];
        for (int j = 0; j < SIDE; j++) {
            vec d[SIDE], t[OUT];
            for (int i = 0; i < SIDE; i++) d[i] = load(m + (SIDE * i + j) * apart + c);
            outward(d, t);
            for (int i = 0; i < OUT; i++) half[SIDE * i + j] = t[i];
        }
        for (int i = 0; i < OUT && row + i < rows; i++) {
            vec t[OUT];
            outward(half + SIDE * i, t);
            for (int j = 0; j < OUT && column + j < columns; j++)
                store(image + ((row + i) * columns + column + j) * out + c, t[j]);
        }
    }
}

/* c [count, vectors x WIDE] in rows of `width` = a [count, in] times b, a vector of which is [in, WIDE] in rows of PANEL,
 * `apart` floats from the next one: every sum in the order of `in` */
static inline __attribute__((always_inline)) void product(int count, int vectors, const float *a, const float *b,
                                                          float *c, int64_t in, int64_t width, int64_t apart) {
    vec sum[ROWS][2] = {0};
    for (int64_t k = 0; k < in; k++, b += PANEL) {
        vec of[2];
        for (int i = 0; i < vectors; i++) of[i] = load(b + i * apart);
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            vec one = a[r * in + k] - (vec){0};
            for (int i = 0; i < vectors; i++) sum[r][i] += one * of[i];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
        for (int i = 0; i < vectors; i++) store(c + r * width + i * WIDE, sum[r][i]);
}

static inline __attribute__((always_inline)) void products(int vectors, int64_t count, const float *a, const float *b,
                                                           float *c, int64_t in, int64_t width, int64_t apart) {
    int64_t t = 0;
    for (; t + ROWS <= count; t += ROWS) product(ROWS, vectors, a + t * in, b, c + t * width, in, width, apart);
    for (; t + FEW <= count; t += FEW) product(FEW, vectors, a + t * in, b, c + t * width, in, width, apart);
    for (; t < count; t++) product(1, vectors, a + t * in, b, c + t * width, in, width, apart);
}

/* Where tile `number` begins, counted through images, rows and columns of tiles */
typedef struct { int64_t image, row, column; } Place;

static Place place_of(int64_t number, int64_t rows, int64_t columns) {
    int64_t down = (rows + OUT - 1) / OUT, across = (columns + OUT - 1) / OUT, within = number % (down * across);
    return (Place){number / (down * across), within / across * OUT, within % across * OUT};
}

/* Tiles first to last of out [images, rows, columns, out] = x [images, rows, columns, in], padded by 1, with weights
 * u [PLACES, out / PANEL, in, PANEL]. A tile's number counts through images, rows and columns of tiles.
 * room: PLACES * (block * (in + out) + 2 * GAP) floats, for `block` tiles at a time. in in LANES, out in PANELs. */
void winograd(const float *x, const float *u, float *y, float *room, int64_t rows, int64_t columns, int64_t in,
              int64_t out, int64_t first, int64_t last, int64_t block) {
    const int64_t v_apart = block * in + GAP, m_apart = block * out + GAP;         /* GAP: not all in one set of a cache */
    float *v = room, *m = room + PLACES * v_apart;
    for (int64_t from = first; from < last; from += block) {
        const int64_t tiles = last - from < block ? last - from : block;
        for (int64_t t = 0; t < tiles; t++) {
            Place at = place_of(from + t, rows, columns);
            transform_tile(x + at.image * rows * columns * in, rows, columns, in, at.row, at.column, v + t * in, v_apart);
        }
        for (int p = 0; p < PLACES; p++)
            for (int64_t n = 0; n < out; n += 2 * WIDE) {
                const float *a = v + p * v_apart, *b = u + (p * out + n) * in;
                float *c = m + p * m_apart + n;
                if (n + 2 * WIDE <= out)
                    products(2, tiles, a, b, c, in, out, WIDE < PANEL ? WIDE : PANEL * in);
                else
                    products(1, tiles, a, b, c, in, out, 0);
            }
        for (int64_t t = 0; t < tiles; t++) {
            Place at = place_of(from + t, rows, columns);
            restore_tile(m + t * out, m_apart, y + at.image * rows * columns * out, rows, columns, out, at.row,
                         at.column);
        }
    }
}

/* ---- The gradient by the weights */

/* Four gradients of a row or column as the six products see them: outward, transposed */
static inline void outward_back(const vec *g, vec *z) {
    vec g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
    vec even = g0 + g2, odd = g1 + g3, far_even = g0 + 4 * g2, far_odd = 2 * g1 + 8 * g3;
    z[0] = g0;
    z[1] = even + odd;
    z[2] = even - odd;
    z[3] = far_even + far_odd;
    z[4] = far_even - far_odd;
    z[5] = g3;
}

static void spread_tile(const float *image, int64_t rows, int64_t columns, int64_t out, int64_t row, int64_t column,
                        float *z, int64_t apart) {
    for (int64_t c = 0; c < out; c += WIDE) {
        vec half[SIDE * OUT];
        for (int j = 0; j < OUT; j++) {
            vec g[OUT], t[SIDE];
            for (int i = 0; i < OUT; i++)
                g[i] = row + i < rows && column + j < columns
                    ? load(image + ((row + i) * columns + column + j) * out + c) : (vec){0};
            outward_back(g, t);
            for (int i = 0; i < SIDE; i++) half[OUT * i + j] = t[i];
        }
        for (int i = 0; i < SIDE; i++) {
            vec t[SIDE];
            outward_back(half + OUT * i, t);
            for (int j = 0; j < SIDE; j++) store(z + (SIDE * i + j) * apart + c, t[j]);
        }
    }
}

/* c [count, vectors x WIDE] in rows of `out` += the sum over tiles of a [tiles, in], of which count are taken, times
 * z [tiles, out], of which as many as in c */
static inline __attribute__((always_inline)) void outer(int count, int vectors, const float *a, const float *z, float *c,
                                                        int64_t tiles, int64_t in, int64_t out) {
    vec sum[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
        for (int i = 0; i < vectors; i++) sum[r][i] = load(c + r * out + i * WIDE);
    for (int64_t t = 0; t < tiles; t++, a += in, z += out) {
        vec of[2];
        for (int i = 0; i < vectors; i++) of[i] = load(z + i * WIDE);
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            vec one = a[r] - (vec){0};
            for (int i = 0; i < vectors; i++) sum[r][i] += one * of[i];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
        for (int i = 0; i < vectors; i++) store(c + r * out + i * WIDE, sum[r][i]);
}

/* in is a multiple of LANES */
static inline __attribute__((always_inline)) void outers(int vectors, const float *a, const float *z, float *c,
                                                         int64_t tiles, int64_t in, int64_t out) {
    int64_t i = 0;
    for (; i + ROWS <= in; i += ROWS) outer(ROWS, vectors, a + i, z, c + i * out, tiles, in, out);
    for (; i < in; i += FEW) outer(FEW, vectors, a + i, z, c + i * out, tiles, in, out);
}

/* Adds to du [PLACES, in, out] what tiles first to last of x [images, rows, columns, in] and of the gradient by the
 * outputs, g [images, rows, columns, out], say of the weights. room as above. */
void winograd_weight(const float *x, const float *g, float *du, float *room, int64_t rows, int64_t columns, int64_t in,
                     int64_t out, int64_t first, int64_t last, int64_t block) {
    const int64_t v_apart = block * in + GAP, z_apart = block * out + GAP;
    float *v = room, *z = room + PLACES * v_apart;
    for (int64_t from = first; from < last; from += block) {
        const int64_t tiles = last - from < block ? last - from : block;
        for (int64_t t = 0; t < tiles; t++) {
            Place at = place_of(from + t, rows, columns);
            transform_tile(x + at.image * rows * columns * in, rows, columns, in, at.row, at.column, v + t * in, v_apart);
            spread_tile(g + at.image * rows * columns * out, rows, columns, out, at.row, at.column, z + t * out, z_apart);
        }
        for (int p = 0; p < PLACES; p++)
            for (int64_t n = 0; n < out; n += 2 * WIDE) {
                const float *a = v + p * v_apart, *b = z + p * z_apart + n;
                float *c = du + p * in * out + n;
                if (n + 2 * WIDE <= out)
                    outers(2, a, b, c, tiles, in, out);
                else
                    outers(1, a, b, c, tiles, in, out);
            }
    }
}
