/* Exact two-dimensional median of float pictures on a GPU: one block of threads a tile of TILE x TILE pixels.
 *
 * The tile with the margin its windows reach into is sorted once, so that every pixel has a rank of its own (equal
 * values in any order). Each thread then slides a window down STRIP pixels. It knows a rank and how many members of
 * its window lie below: a row in and a row out are 2 * size comparisons of ranks, and the new median is found by
 * walking along the sorted pixels, counting those inside the window (T. Huang et al., IEEE TASSP 27 (1979), on the
 * moving median; the CPU's median.c rests on the same two ideas).
 *
 * The sort deals the keys into buckets split by a sorted sample and ranks each bucket by counting. A value that the
 * sample holds twice gets a bucket of its own, which needs no ranking: ties cost nothing.
 *
 * NaN anywhere in a window makes its median NaN. */
#pragma once

#include <string.h>

#include "portable.h"

enum { TILE = 32, STRIP = 8, MEDIAN_THREADS = TILE * TILE / STRIP, BUCKETS = 128, SPLITS = BUCKETS - 1 };

#define NAN_KEY UINT32_C(0xFFC00000)

template <class T> struct median_args {
    const T *x;    /* [planes, height, width], contiguous */
    T *y;
    int32_t height, width, size;
    int32_t replicate;    /* what lies outside the picture: the nearest pixel, or zeros */
};

/* A block's memory. n = side * side pixels of the tile with its margin. */
struct median_tile {
    uint32_t *keys;      /* [n] by position; once dealt: in sorted order */
    uint32_t *dealt;     /* [n] keys bucket by bucket */
    uint32_t *sample;    /* [BUCKETS] */
    uint32_t *splits;    /* [SPLITS] ascending: bucket b holds splits[b - 1] <= key < splits[b] */
    int32_t *start;      /* [BUCKETS + 1] of each bucket among the dealt keys */
    int32_t *cursor;     /* [BUCKETS] */
    int32_t *flags;      /* [2] the tile holds different values; it holds NaN */
    uint16_t *ranks;     /* [n] by position; before that: the bucket */
    uint16_t *places;    /* [n] position of each dealt key */
    uint16_t *order;     /* [n] row << 8 | column of each pixel in sorted order */
};

HD int32_t median_side(int32_t size) { return TILE + size - 1; }

/* Bytes of a block's memory. */
HD int64_t median_bytes(int32_t size) {
    int64_t n = (int64_t)median_side(size) * median_side(size);
    return n * (2 * sizeof(uint32_t) + 3 * sizeof(uint16_t)) + (4 * BUCKETS + 2) * sizeof(int32_t);
}

HD median_tile carve(void *memory, int32_t size) {
    int32_t n = median_side(size) * median_side(size);
    uint32_t *words = (uint32_t *)memory;
    median_tile t;
    t.keys = words;
    t.dealt = t.keys + n;
    t.sample = t.dealt + n;
    t.splits = t.sample + BUCKETS;
    t.start = (int32_t *)(t.splits + SPLITS);
    t.cursor = t.start + BUCKETS + 1;
    t.flags = t.cursor + BUCKETS;
    t.ranks = (uint16_t *)(t.flags + 2);
    t.places = t.ranks + n;
    t.order = t.places + n;
    return t;
}

/* The bits of a float as an unsigned integer in the order of the numbers, every NaN above them; and back. */
HD uint32_t key_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return NAN_KEY;
    return bits ^ (bits >> 31 ? UINT32_C(0xFFFFFFFF) : UINT32_C(0x80000000));
}

HD float value_of(uint32_t key) {
    uint32_t bits = key ^ (key >> 31 ? UINT32_C(0x80000000) : UINT32_C(0xFFFFFFFF));
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> HD uint32_t key_at(const median_args<T> &a, const T *plane, int32_t row, int32_t column) {
    if (a.replicate) {
        row = row < 0 ? 0 : row < a.height ? row : a.height - 1;
        column = column < 0 ? 0 : column < a.width ? column : a.width - 1;
    } else if (row < 0 || row >= a.height || column < 0 || column >= a.width) {
        return key_of(0);
    }
    return key_of(widen(plane[row * a.width + column]));
}

/* Take the next one of a bucket's places. */
HD int32_t take(int32_t *counter) {
#ifdef __CUDA_ARCH__
    return atomicAdd(counter, 1);
#else
    return (*counter)++;
#endif
}

/* How many splits are at or below the key: its bucket. */
HD int32_t bucket_of(const uint32_t *splits, uint32_t key) {
    int32_t low = 0;
    UNROLL for (int32_t step = BUCKETS / 2; step > 0; step /= 2)
        if (splits[low + step - 1] <= key) low += step;
    return low;
}

/* Rank of the key that was dealt to `slot`. */
HD int32_t rank_of(const median_tile &t, int32_t slot, int32_t bucket) {
    if (bucket > 0 && bucket < SPLITS && t.splits[bucket] == t.splits[bucket - 1] + 1) return slot;    /* all equal */
    uint32_t key = t.dealt[slot];
    int32_t rank = t.start[bucket];
    for (int32_t i = t.start[bucket]; i < t.start[bucket + 1]; i++)
        rank += t.dealt[i] < key || (t.dealt[i] == key && i < slot);
    return rank;
}

HD bool has_nan(const median_tile &t, int32_t row, int32_t column, int32_t size) {
    for (int32_t i = row; i < row + size; i++)
        for (int32_t j = column; j < column + size; j++)
            if (t.keys[t.ranks[i * median_side(size) + j]] == NAN_KEY) return true;
    return false;
}

/* How many of a window's row lie below a rank. */
HD int32_t below(const uint16_t *ranks, int32_t size, int32_t rank) {
    int32_t count = 0;
    for (int32_t j = 0; j < size; j++) count += ranks[j] < rank;
    return count;
}

/* A rank near a window's median: the mean over every third of its rows. */
HD int32_t guess_rank(const uint16_t *ranks, int32_t size, int32_t side) {
    int32_t sum = 0, rows = 0;
    for (int32_t i = 0; i < size; i += 3, rows++)
        for (int32_t j = 0; j < size; j++) sum += ranks[i * side + j];
    return sum / (rows * size);
}

/* Medians of the strip that begins at this row and column of the tile; `rows` of them lie in the picture. */
template <class T>
HD void slide(const median_tile &t, int32_t size, int32_t row, int32_t column, int32_t rows, T *y, int32_t width) {
    int32_t side = median_side(size), half = size * size / 2;
    int32_t rank = guess_rank(t.ranks + row * side + column, size, side), lower = 0;    /* members below the rank */
    for (int32_t i = 0; i < size; i++) lower += below(t.ranks + (row + i) * side + column, size, rank);
    for (int32_t end = row + rows;;) {
        int32_t corner = row << 8 | column;
        for (;;) {    /* down until no more than half lie below, then up to the member that has half below it */
            bool down = lower > half;
            if (down) rank--;
            uint32_t off_row = (t.order[rank] >> 8) - (corner >> 8), off_column = (t.order[rank] & 255) - (corner & 255);
            bool inside = off_row < (uint32_t)size && off_column < (uint32_t)size;
            if (down) {
                lower -= inside;
            } else {
                if (inside && lower == half) break;
                lower += inside;
                rank++;
            }
        }
        uint32_t key = t.flags[1] && has_nan(t, row, column, size) ? NAN_KEY : t.keys[rank];
        *y = narrow<T>(value_of(key));
        if (row + 1 == end) return;
        lower += below(t.ranks + (row + size) * side + column, size, rank) - below(t.ranks + row * side + column, size, rank);
        row++;
        y += width;
    }
}

/* All that a block does. `each(f)` calls f(thread) for each of its threads and waits for them all. */
template <class T, class Each>
HD void median_block(const median_args<T> &a, const median_tile &t, int64_t block, Each each) {
    const int32_t side = median_side(a.size), n = side * side, margin = a.size / 2;
    const int32_t across = (a.width + TILE - 1) / TILE, down = (a.height + TILE - 1) / TILE;
    const int32_t column = (int32_t)(block % across) * TILE, row = (int32_t)(block / across % down) * TILE;
    const int64_t plane = block / across / down * ((int64_t)a.height * a.width);
    const T *x = a.x + plane;
    T *y = a.y + plane + row * a.width + column;
    const int32_t rows = a.height - row < TILE ? a.height - row : TILE;
    const int32_t columns = a.width - column < TILE ? a.width - column : TILE;
    const uint32_t first = key_at(a, x, row - margin, column - margin);

    each([&](int32_t thread) {
        for (int32_t b = thread; b < BUCKETS; b += MEDIAN_THREADS) t.cursor[b] = 0;
        if (thread < 2) t.flags[thread] = 0;
    });
    each([&](int32_t thread) {
        for (int32_t i = thread; i < n; i += MEDIAN_THREADS) {
            uint32_t key = key_at(a, x, row - margin + i / side, column - margin + i % side);
            t.keys[i] = key;
            if (key != first) t.flags[0] = 1;
            if (key == NAN_KEY) t.flags[1] = 1;
        }
    });
    if (!t.flags[0]) {    /* outside the head there are only zeros */
        each([&](int32_t thread) {
            for (int32_t i = thread / TILE; i < rows; i += MEDIAN_THREADS / TILE)
                if (thread % TILE < columns) y[i * a.width + thread % TILE] = narrow<T>(value_of(first));
        });
        return;
    }

    each([&](int32_t thread) {    /* one key of every BUCKETS-th part of the tile, from anywhere in it */
        for (int32_t b = thread; b < BUCKETS; b += MEDIAN_THREADS) {
            uint32_t jitter = (uint32_t)b * UINT32_C(2654435761) >> 16;
            t.sample[b] = t.keys[b * n / BUCKETS + jitter % (n / BUCKETS)];
        }
    });
    each([&](int32_t thread) {    /* sorted by counting, into `start` for the moment */
        for (int32_t b = thread; b < BUCKETS; b += MEDIAN_THREADS) {
            int32_t rank = 0;
            for (int32_t i = 0; i < BUCKETS; i++)
                rank += t.sample[i] < t.sample[b] || (t.sample[i] == t.sample[b] && i < b);
            t.start[rank] = (int32_t)t.sample[b];
        }
    });
    each([&](int32_t thread) {    /* the repeats of a value split it from the values above */
        for (int32_t b = thread; b < SPLITS; b += MEDIAN_THREADS)
            t.splits[b] = (uint32_t)t.start[b] + (b > 0 && t.start[b] == t.start[b - 1]);
    });
    each([&](int32_t thread) {
        for (int32_t i = thread; i < n; i += MEDIAN_THREADS) {
            t.ranks[i] = (uint16_t)bucket_of(t.splits, t.keys[i]);
            take(t.cursor + t.ranks[i]);
        }
    });
    each([&](int32_t thread) {
        for (int32_t b = thread; b <= BUCKETS; b += MEDIAN_THREADS) {
            int32_t sum = 0;
            for (int32_t i = 0; i < b; i++) sum += t.cursor[i];
            t.start[b] = sum;
        }
    });
    each([&](int32_t thread) {
        for (int32_t b = thread; b < BUCKETS; b += MEDIAN_THREADS) t.cursor[b] = t.start[b];
    });
    each([&](int32_t thread) {
        for (int32_t i = thread; i < n; i += MEDIAN_THREADS) {
            int32_t slot = take(t.cursor + t.ranks[i]);
            t.dealt[slot] = t.keys[i];
            t.places[slot] = (uint16_t)i;
        }
    });
    each([&](int32_t thread) {
        for (int32_t slot = thread; slot < n; slot += MEDIAN_THREADS) {
            int32_t i = t.places[slot], rank = rank_of(t, slot, t.ranks[i]);
            t.ranks[i] = (uint16_t)rank;
            t.keys[rank] = t.dealt[slot];
            t.order[rank] = (uint16_t)(i / side << 8 | i % side);
        }
    });
    each([&](int32_t thread) {
        int32_t from = thread / TILE * STRIP, at = thread % TILE;
        int32_t count = rows - from < STRIP ? rows - from : STRIP;
        if (at < columns && count > 0) slide(t, a.size, from, at, count, y + from * a.width + at, a.width);
    });
}

/* For windows whose tile exceeds a block's memory: pixel i's median bit by bit from the most significant, the
 * largest key with no more than half of the window below it. */
template <class T> HD void median_wide(const median_args<T> &a, int64_t i) {
    const int32_t column = (int32_t)(i % a.width), row = (int32_t)(i / a.width % a.height), margin = a.size / 2;
    const T *x = a.x + i / a.width / a.height * ((int64_t)a.height * a.width);
    const int64_t half = (int64_t)a.size * a.size / 2;
    uint32_t key = 0;
    for (uint32_t bit = UINT32_C(1) << 31; bit; bit >>= 1) {
        int64_t lower = 0;
        for (int32_t r = row - margin; r <= row + margin; r++)
            for (int32_t c = column - margin; c <= column + margin; c++) {
                uint32_t member = key_at(a, x, r, c);
                if (member == NAN_KEY) {
                    a.y[i] = narrow<T>(value_of(NAN_KEY));
                    return;
                }
                lower += member < (key | bit);
            }
        if (lower <= half) key |= bit;
    }
    a.y[i] = narrow<T>(value_of(key));
}
