/* Kernels and launcher of op/bias_act.py. */
#include "launch.cuh"
#include "bias_act.h"

template <class T, int V, class Index>
__global__ void __launch_bounds__(THREADS) bias_act_kernel(bias_act_args<T> a, Index threads) {
    Index thread = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (thread >= threads) return;
    if (a.output) bias_act_grad<T, V, Index>(a, thread);
    else bias_act<T, V, Index>(a, thread);
}

template <class T, int V> static void launch_as(const bias_act_args<T> &a, int64_t numel, cudaStream_t stream) {
    int64_t threads = numel / V;
    if (numel <= INT32_MAX - THREADS * V)
        bias_act_kernel<T, V, int32_t><<<blocks_for(threads), THREADS, 0, stream>>>(a, (int32_t)threads);
    else
        bias_act_kernel<T, V, int64_t><<<blocks_for(threads), THREADS, 0, stream>>>(a, threads);
}

template <class T>
static void launch(const void *x, const void *bias, const void *output, void *y, int64_t numel, int64_t channels,
                   int64_t inner, double slope, double gain, cudaStream_t stream) {
    typedef typename accumulator<T>::type A;
    const int V = PACK_BYTES / sizeof(T);
    bias_act_args<T> a = {(const T *)x, (const A *)bias, (const T *)output, (T *)y, channels, inner,
                          (A)slope, (A)gain};
    bool packed = is_packed(x) && is_packed(output) && is_packed(y) && numel % V == 0;
    bool free_of_channels = !bias || output;
    if (packed && (free_of_channels || inner % V == 0 || (inner == 1 && channels % V == 0)))
        launch_as<T, V>(a, numel, stream);
    else
        launch_as<T, 1>(a, numel, stream);
}

extern "C" int bias_act_cuda(const void *x, const void *bias, const void *output, void *y, int dtype, int64_t numel,
                             int64_t channels, int64_t inner, double slope, double gain, void *stream) {
    auto run = dtype == FLOAT32    ? launch<float>
               : dtype == FLOAT16  ? launch<__half>
               : dtype == BFLOAT16 ? launch<__nv_bfloat16>
                                   : launch<double>;
    run(x, bias, output, y, numel, channels, inner, slope, gain, (cudaStream_t)stream);
    return cudaGetLastError();
}
