/* Kernels and launcher of op/upfirdn2d.py. */
#include "launch.cuh"
#include "upfirdn2d.h"

/* A tile takes over 100 registers a thread: small blocks leave fewer of them unused. */
enum { TILE_THREADS = 128 };

template <class T, class Index>
__global__ void __launch_bounds__(THREADS)
    point_kernel(upfirdn_shape s, const T *x, const typename accumulator<T>::type *kernel, T *y, Index outputs) {
    Index i = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (i < outputs) upfirdn_point<T, Index>(s, x, kernel, y, i);
}

template <class T, int V, int UP, int DOWN, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(TILE_THREADS)
    tile_kernel(upfirdn_shape s, const T *x, const float *kernel, T *y, uint32_t threads) {
    uint32_t thread = blockIdx.x * TILE_THREADS + threadIdx.x;
    if (thread < threads) upfirdn_tile<T, V, UP, DOWN, ROWS, COLUMNS>(s, x, kernel, y, thread);
}

template <class T>
static void launch_points(const upfirdn_shape &s, const T *x, const void *kernel, T *y, cudaStream_t stream) {
    typedef typename accumulator<T>::type A;
    int64_t outputs = s.planes * s.out_h * s.out_w * s.inner, inputs = s.planes * s.in_h * s.in_w * s.inner;
    if ((outputs > inputs ? outputs : inputs) <= INT32_MAX - THREADS)
        point_kernel<T, int32_t>
            <<<blocks_for(outputs), THREADS, 0, stream>>>(s, x, (const A *)kernel, y, (int32_t)outputs);
    else
        point_kernel<T, int64_t><<<blocks_for(outputs), THREADS, 0, stream>>>(s, x, (const A *)kernel, y, outputs);
}

template <class T, int V, int UP, int DOWN, int ROWS, int COLUMNS>
static bool launch_tiles(const upfirdn_shape &s, const T *x, const float *kernel, T *y, cudaStream_t stream) {
    typedef tiling<UP, DOWN, ROWS, COLUMNS> tiles;
    int64_t threads = s.planes * tiles::down_tiles(s) * tiles::across_tiles(s) * (s.inner / V);
    if (threads > UINT32_MAX - TILE_THREADS) return false;
    tile_kernel<T, V, UP, DOWN, ROWS, COLUMNS>
        <<<blocks_for(threads, TILE_THREADS), TILE_THREADS, 0, stream>>>(s, x, kernel, y, (uint32_t)threads);
    return true;
}

/* Many channels: 2 columns share their loads. Few: neighbouring threads take neighbouring columns. */
template <class T, int UP, int DOWN>
static bool launch_best_tiles(const upfirdn_shape &s, const T *x, const float *kernel, T *y, cudaStream_t stream) {
    const int V = PACK_BYTES / sizeof(T);
    if (s.inner % V == 0 && is_packed(x) && is_packed(y))
        return launch_tiles<T, V, UP, DOWN, 4, 2>(s, x, kernel, y, stream);
    return launch_tiles<T, 1, UP, DOWN, 8, UP>(s, x, kernel, y, stream);
}

template <class T> static bool launch_specialised(const upfirdn_shape &s, const T *x, const void *kernel, T *y,
                                                  cudaStream_t stream) {
    const float *taps = (const float *)kernel;
    bool small = (int64_t)s.in_h * s.in_w * s.inner <= INT32_MAX && (int64_t)s.out_h * s.out_w * s.inner <= INT32_MAX;
    if (s.kh != 4 || s.kw != 4 || !small) return false;
    if (s.up == 1 && s.down == 1) return launch_best_tiles<T, 1, 1>(s, x, taps, y, stream);
    if (s.up == 2 && s.down == 1) return launch_best_tiles<T, 2, 1>(s, x, taps, y, stream);
    if (s.up == 1 && s.down == 2) return launch_best_tiles<T, 1, 2>(s, x, taps, y, stream);
    return false;
}

template <> bool launch_specialised<double>(const upfirdn_shape &, const double *, const void *, double *,
                                            cudaStream_t) {
    return false;
}

template <class T>
static void launch(const upfirdn_shape &s, const void *x, const void *kernel, void *y, cudaStream_t stream) {
    if (!launch_specialised<T>(s, (const T *)x, kernel, (T *)y, stream))
        launch_points<T>(s, (const T *)x, kernel, (T *)y, stream);
}

/* sizes: planes, in_h, in_w, out_h, out_w, inner, kh, kw, up, down, left, top, correlate. The kernel is float, of
 * double tensors double. */
extern "C" int upfirdn2d_cuda(const void *x, const void *kernel, void *y, int dtype, const int64_t *sizes,
                              void *stream) {
    const int64_t *n = sizes;
    upfirdn_shape s = {n[0], (int32_t)n[1], (int32_t)n[2], (int32_t)n[3], (int32_t)n[4], (int32_t)n[5],
                       (int32_t)n[6], (int32_t)n[7], (int32_t)n[8], (int32_t)n[9], (int32_t)n[10], (int32_t)n[11],
                       (int32_t)n[12]};
    auto run = dtype == FLOAT32    ? launch<float>
               : dtype == FLOAT16  ? launch<__half>
               : dtype == BFLOAT16 ? launch<__nv_bfloat16>
                                   : launch<double>;
    run(s, x, kernel, y, (cudaStream_t)stream);
    return cudaGetLastError();
}
