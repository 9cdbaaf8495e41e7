/* Exact two-dimensional median filter of 32-bit floats, for op/median.py to call through ctypes. Plain C.
 *
 * Wide windows cost O(size) per pixel, whatever the values. A tile of the picture (with the margin its
 * windows reach into) is sorted once, so that every pixel has a rank of its own. The sliding window is then a
 * bit set over the ranks: one column in and one out are 2 * size bit flips, and the median is found by
 * walking from where it was over the words of the set (T. Huang et al., IEEE TASSP 27 (1979), on the moving
 * median; J. Suomela, 'Median filtering is equivalent to sorting', arXiv:1406.1717, on sorted blocks). A
 * small tile keeps the set and the sort in the nearest caches and the words of the set dense.
 *
 * Narrow windows (size 3 and 5) are selected by minima and maxima, many pixels at a time in vector registers.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    DIGIT_BITS = 11,  /* of the radix sort: three passes over a 32-bit key */
    BUCKETS = 1 << DIGIT_BITS,
    TILE = 64,
    LANES = 64        /* pixels of a row that are selected together */
};

#define SIGN UINT32_C(0x80000000)

typedef struct {
    uint64_t *words;        /* bit r is set when the pixel of rank r is in the window */
    int32_t word;           /* the word that held the last median */
    int32_t below;          /* members of the window in the words before it */
    const uint32_t *ranks;  /* of the tile's pixels */
    int pitch, size;        /* row length of the tile, side of the window */
    int y, x;               /* the window's corner */
} window;

/* The bits of a float as an integer in the order of the numbers, and back: the map is its own inverse. */
static inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }

static inline int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Stable radix sort by the upper 32 bits of each item; a digit that all items share costs one counting pass.
 * The result is in the returned one of the two buffers. */
static uint64_t *sort_items(uint64_t *items, uint64_t *spare, int32_t n) {
    uint32_t start[BUCKETS];
    for (int shift = 32; shift < 64; shift += DIGIT_BITS) {
        memset(start, 0, sizeof start);
        for (int32_t i = 0; i < n; i++) start[items[i] >> shift & (BUCKETS - 1)]++;
        if (start[items[0] >> shift & (BUCKETS - 1)] == (uint32_t)n) continue;
        uint32_t sum = 0;
        for (int b = 0; b < BUCKETS; b++) {
            uint32_t count = start[b];
            start[b] = sum;
            sum += count;
        }
        for (int32_t i = 0; i < n; i++) spare[start[items[i] >> shift & (BUCKETS - 1)]++] = items[i];
        uint64_t *sorted = spare;
        spare = items;
        items = sorted;
    }
    return items;
}

/* Put a run of pixels, from row y and column x on, into the window (sign 1) or take it out (sign -1). */
static inline void flip(window *w, int y, int x, int stride, int sign) {
    const uint32_t *rank = w->ranks + y * w->pitch + x;
    int32_t below = 0;
    for (int i = 0; i < w->size; i++, rank += stride) {
        int32_t word = (int32_t)(*rank >> 6);
        w->words[word] ^= UINT64_C(1) << (*rank & 63);
        below += word < w->word;
    }
    w->below += sign * below;
}

static void place(window *w, int y, int x) {
    w->word = w->below = 0;
    w->y = y;
    w->x = x;
    for (int i = 0; i < w->size; i++) flip(w, y + i, x, 1, 1);
}

static inline void move_down(window *w) {
    flip(w, w->y + w->size, w->x, 1, 1);
    flip(w, w->y++, w->x, 1, -1);
}

static inline void move_right(window *w) {
    flip(w, w->y, w->x + w->size, w->pitch, 1);
    flip(w, w->y, w->x++, w->pitch, -1);
}

static inline void move_left(window *w) {
    flip(w, w->y, w->x - 1, w->pitch, 1);
    flip(w, w->y, w->x-- + w->size - 1, w->pitch, -1);
}

/* Rank of the member that has `half` members below it. */
static inline uint32_t median_rank(window *w, int32_t half) {
    while (w->below > half) w->below -= __builtin_popcountll(w->words[--w->word]);
    for (int count; w->below + (count = __builtin_popcountll(w->words[w->word])) <= half; w->word++)
        w->below += count;
    uint64_t bits = w->words[w->word];
    for (int32_t skip = half - w->below; skip > 0; skip--) bits &= bits - 1;
    return (uint32_t)w->word << 6 | (uint32_t)__builtin_ctzll(bits);
}

/* A tile with its margin: the items to sort, the rank of every pixel, and for every row the first and last
 * column that isn't zero (first > last where all are). */
typedef struct {
    uint64_t *items;
    uint32_t *ranks;
    int *first, *last;
} tile;

/* Find the columns that aren't zero; 0 when there are none. */
static int find_extent(tile *t, const float *padded, int64_t pitch, int rows, int columns) {
    int any = 0;
    for (int y = 0; y < rows; y++, padded += pitch) {
        int first = 0, last = columns - 1;
        while (first <= last && padded[first] == 0) first++;
        while (first <= last && padded[last] == 0) last--;
        any |= first <= last;
        t->first[y] = first;
        t->last[y] = last;
    }
    return any;
}

/* Medians of rows x columns pixels. The window snakes over the pixels whose window holds anything but zeros
 * (outside the brain mask there is nothing else): it is built once, and the outside costs nothing. */
static void slide(window *w, const tile *t, const uint64_t *sorted, int rows, int columns, float *out,
                  int64_t out_pitch) {
    int32_t half = w->size * w->size / 2;
    int placed = 0;
    for (int y = 0; y < rows; y++, out += out_pitch) {
        int left = columns, right = -1;
        for (int i = y; i < y + w->size; i++) {
            if (t->first[i] > t->last[i]) continue;
            if (t->first[i] - w->size + 1 < left) left = t->first[i] - w->size + 1;
            if (t->last[i] > right) right = t->last[i];
        }
        if (left < 0) left = 0;
        if (right > columns - 1) right = columns - 1;
        for (int x = 0; x < columns; x++) out[x] = 0;
        if (left > right) continue;

        if (!placed) place(w, y, left);
        placed = 1;
        while (w->y < y) move_down(w);
        int rightwards = w->x - left < right - w->x;
        while (w->x < (rightwards ? left : right)) move_right(w);
        while (w->x > (rightwards ? left : right)) move_left(w);
        for (;;) {
            int32_t key = (int32_t)((uint32_t)(sorted[median_rank(w, half)] >> 32) ^ SIGN);
            out[w->x] = float_of(ordered(key));
            if (w->x == (rightwards ? right : left)) break;
            if (rightwards) move_right(w);
            else move_left(w);
        }
    }
}

/* One plane by tiles. */
static void filter_wide(const float *padded, float *out, int64_t height, int64_t width, int size, tile *t,
                        window *w) {
    int64_t pitch = width + size - 1;
    for (int64_t y0 = 0; y0 < height; y0 += TILE)
        for (int64_t x0 = 0; x0 < width; x0 += TILE) {
            int rows = (int)(height - y0 < TILE ? height - y0 : TILE);
            int columns = (int)(width - x0 < TILE ? width - x0 : TILE);
            int tile_rows = rows + size - 1, tile_pitch = columns + size - 1;
            int32_t n = tile_rows * tile_pitch;
            const float *from = padded + y0 * pitch + x0;
            float *to = out + y0 * width + x0;
            if (!find_extent(t, from, pitch, tile_rows, tile_pitch)) {
                for (int y = 0; y < rows; y++) memset(to + y * width, 0, columns * sizeof *to);
                continue;
            }
            for (int y = 0, i = 0; y < tile_rows; y++)
                for (int x = 0; x < tile_pitch; x++, i++) {
                    uint32_t key = (uint32_t)ordered(bits_of(from[y * pitch + x])) ^ SIGN;
                    t->items[i] = (uint64_t)key << 32 | (uint32_t)i;
                }
            const uint64_t *sorted = sort_items(t->items, t->items + n, n);
            for (int32_t r = 0; r < n; r++) t->ranks[(uint32_t)sorted[r]] = (uint32_t)r;
            memset(w->words, 0, (n / 64 + 1) * sizeof *w->words);
            w->ranks = t->ranks;
            w->pitch = tile_pitch;
            slide(w, t, sorted, rows, columns, to, width);
        }
}

/* On integers, whose minima and maxima need no leave from a compiler's floating-point rules, and in a
 * function of its own: so it becomes vector code with any flags and whatever is made of its caller. */
static __attribute__((noinline)) void order(int32_t *restrict low, int32_t *restrict high) {
    for (int i = 0; i < LANES; i++) {
        int32_t a = low[i], b = high[i];
        low[i] = a < b ? a : b;
        high[i] = a < b ? b : a;
    }
}

static inline void load(int32_t *restrict lanes, const float *restrict from) {
    for (int i = 0; i < LANES; i++) lanes[i] = ordered(bits_of(from[i]));
}

/* Medians of LANES neighbouring pixels by forgetful selection: of n / 2 + 2 members neither the least nor the
 * greatest can be the median, so both are dropped, one further member joins, and so on until one is left. */
static void select_narrow(const float *padded, float *out, int64_t pitch, int size) {
    int32_t v[5 * 5 / 2 + 2][LANES];
    int n = size * size, next = n / 2 + 2;
    for (int j = 0; j < next; j++) load(v[j], padded + j / size * pitch + j % size);
    for (int m = next; m > 2; m--) {
        for (int j = 0; j < m / 2; j++) order(v[j], v[m - 1 - j]);
        for (int j = 1; j < (m + 1) / 2; j++) order(v[0], v[j]);    /* the least to the front */
        for (int j = m / 2; j < m - 1; j++) order(v[j], v[m - 1]);  /* the greatest to the back */
        if (next < n) {
            load(v[0], padded + next / size * pitch + next % size);
            next++;
        }
    }
    for (int i = 0; i < LANES; i++) out[i] = float_of(ordered(v[1][i]));
}

/* One plane, at least LANES wide; the last step of a row overlaps the one before. */
static void filter_narrow(const float *padded, float *out, int64_t height, int64_t width, int size) {
    int64_t pitch = width + size - 1;
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x += LANES) {
            int64_t at = x + LANES <= width ? x : width - LANES;
            select_narrow(padded + y * pitch + at, out + y * width + at, pitch, size);
        }
}

/* padded [planes, height + size - 1, width + size - 1] to out [planes, height, width], both C-contiguous and
 * not empty, without NaN; size odd and below 32768. Returns 0, or 1 when memory ran out. */
int median2d(const float *padded, float *out, int64_t planes, int64_t height, int64_t width, int size) {
    int64_t plane = (height + size - 1) * (width + size - 1);
    if ((size == 3 || size == 5) && width >= LANES) {
        for (int64_t p = 0; p < planes; p++)
            filter_narrow(padded + p * plane, out + p * height * width, height, width, size);
        return 0;
    }
    int64_t side = TILE + size - 1;
    tile t = {malloc(2 * side * side * sizeof *t.items), malloc(side * side * sizeof *t.ranks),
              malloc(side * sizeof *t.first), malloc(side * sizeof *t.last)};
    window w = {.words = malloc((side * side / 64 + 1) * sizeof *w.words), .size = size};
    int failed = !t.items || !t.ranks || !t.first || !t.last || !w.words;
    for (int64_t p = 0; p < planes && !failed; p++)
        filter_wide(padded + p * plane, out + p * height * width, height, width, size, &t, &w);
    free(t.items);
    free(t.ranks);
    free(t.first);
    free(t.last);
    free(w.words);
    return failed;
}
