/* The kernels' work on the CPU, thread by thread, for the tests: the same functions that nvcc puts into kernels, in
 * loops over the grid that the launchers would start. `backwards` runs a block's threads from last to first between
 * two barriers: the result may not depend on it. */
#include <vector>

#include "bias_act.h"
#include "median.h"
#include "styled_act.h"
#include "upfirdn2d.h"

template <int V, class Index> static void run_bias_act(const bias_act_args<float> &a, int64_t numel) {
    for (Index thread = 0; thread < numel / V; thread++)
        if (a.output) bias_act_grad<float, V, Index>(a, thread);
        else bias_act<float, V, Index>(a, thread);
}

extern "C" void emulate_bias_act(const float *x, const float *bias, const float *output, float *y, int64_t numel,
                                 int64_t channels, int64_t inner, double slope, double gain, int packed, int wide) {
    bias_act_args<float> a = {x, bias, output, y, channels, inner, (float)slope, (float)gain};
    auto run = packed ? wide ? run_bias_act<4, int64_t> : run_bias_act<4, int32_t>
                      : wide ? run_bias_act<1, int64_t> : run_bias_act<1, int32_t>;
    run(a, numel);
}

template <int V, int UP, int DOWN, int ROWS, int COLUMNS>
static void run_tiles(const upfirdn_shape &s, const float *x, const float *kernel, float *y) {
    typedef tiling<UP, DOWN, ROWS, COLUMNS> tiles;
    int64_t threads = s.planes * tiles::down_tiles(s) * tiles::across_tiles(s) * (s.inner / V);
    for (int64_t thread = 0; thread < threads; thread++)
        upfirdn_tile<float, V, UP, DOWN, ROWS, COLUMNS>(s, x, kernel, y, (uint32_t)thread);
}

template <int UP, int DOWN>
static void run_best_tiles(const upfirdn_shape &s, const float *x, const float *kernel, float *y) {
    if (s.inner % 4 == 0) run_tiles<4, UP, DOWN, 4, 2>(s, x, kernel, y);
    else run_tiles<1, UP, DOWN, 8, UP>(s, x, kernel, y);
}

/* mode 0: a thread an output, 32-bit indices; 1: the same, 64-bit; 2: register tiles. */
extern "C" void emulate_upfirdn2d(const float *x, const float *kernel, float *y, const int64_t *sizes, int mode) {
    const int64_t *n = sizes;
    upfirdn_shape s = {n[0], (int32_t)n[1], (int32_t)n[2], (int32_t)n[3], (int32_t)n[4], (int32_t)n[5],
                       (int32_t)n[6], (int32_t)n[7], (int32_t)n[8], (int32_t)n[9], (int32_t)n[10], (int32_t)n[11],
                       (int32_t)n[12]};
    int64_t outputs = s.planes * s.out_h * s.out_w * s.inner;
    if (mode == 0)
        for (int32_t i = 0; i < outputs; i++) upfirdn_point<float, int32_t>(s, x, kernel, y, i);
    else if (mode == 1)
        for (int64_t i = 0; i < outputs; i++) upfirdn_point<float, int64_t>(s, x, kernel, y, i);
    else if (s.up == 2) run_best_tiles<2, 1>(s, x, kernel, y);
    else if (s.down == 2) run_best_tiles<1, 2>(s, x, kernel, y);
    else run_best_tiles<1, 1>(s, x, kernel, y);
}

extern "C" void emulate_median2d(const float *x, float *y, int64_t planes, int height, int width, int size,
                                 int replicate, int wide, int backwards) {
    median_args<float> a = {x, y, height, width, size, replicate};
    if (wide) {
        for (int64_t i = 0; i < planes * height * width; i++) median_wide(a, i);
        return;
    }
    std::vector<uint32_t> memory(median_bytes(size) / sizeof(uint32_t) + 1);
    int64_t blocks = planes * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE);
    for (int64_t block = 0; block < blocks; block++)
        median_block(a, carve(memory.data(), size), block, [=](auto work) {
            for (int32_t i = 0; i < MEDIAN_THREADS; i++) work(backwards ? MEDIAN_THREADS - 1 - i : i);
        });
}

/* As styled_act_cuda, of float32. */
extern "C" int emulate_styled_act(const float *x, const float *factor, const float *noise, const float *strength,
                                  const float *bias, const float *output, const float *grad, float *y,
                                  float *noise_grad, float *sums, float *strength_sums, int, const int64_t *sizes,
                                  double slope, void *) {
    styled_args<float> a = {x, factor, noise, strength, bias, output, grad, y, noise_grad, sums, strength_sums,
                            (int32_t)sizes[1], (int32_t)sizes[2], sizes[3], (int32_t)sizes[4], (float)slope};
    int64_t blocks = sizes[0] * styled_place<float, 4>::pieces(a.pixels, a.channels);
    for (int64_t block = 0; block < blocks; block++) {
        styled_memory memory;
        for (int32_t i = 0; i < STYLED_THREADS; i++)
            if (grad) styled_gradient<float, 4>(a, memory, block, i);
            else styled_forward<float, 4>(a, block, i);
        for (int32_t i = 0; grad && i < STYLED_THREADS; i++) styled_sums<float, 4>(a, memory, block, i);
    }
    return 0;
}
