/* Kernels and launcher of op/styled.py. */
#include "launch.cuh"
#include "styled_act.h"

template <class T, int V> __global__ void __launch_bounds__(STYLED_THREADS) forward_kernel(styled_args<T> a) {
    styled_forward<T, V>(a, blockIdx.x, threadIdx.x);
}

template <class T, int V> __global__ void __launch_bounds__(STYLED_THREADS) gradient_kernel(styled_args<T> a) {
    __shared__ styled_memory memory;
    styled_gradient<T, V>(a, memory, blockIdx.x, threadIdx.x);
    __syncthreads();
    styled_sums<T, V>(a, memory, blockIdx.x, threadIdx.x);
}

/* sizes: images, pixels, channels, and the steps of the noise from image to image and from pixel to pixel. */
template <class T>
static void launch(const void *x, const void *factor, const void *noise, const void *strength, const void *bias,
                   const void *output, const void *grad, void *y, void *noise_grad, void *sums, void *strength_sums,
                   const int64_t *sizes, double slope, cudaStream_t stream) {
    const int V = PACK_BYTES / sizeof(T);
    styled_args<T> a = {(const T *)x, (const T *)factor, (const float *)noise, (const float *)strength,
                        (const float *)bias, (const T *)output, (const T *)grad, (T *)y, (float *)noise_grad,
                        (float *)sums, (float *)strength_sums, (int32_t)sizes[1], (int32_t)sizes[2], sizes[3],
                        (int32_t)sizes[4], (float)slope};
    unsigned blocks = (unsigned)(sizes[0] * styled_place<T, V>::pieces(a.pixels, a.channels));
    if (a.grad) gradient_kernel<T, V><<<blocks, STYLED_THREADS, 0, stream>>>(a);
    else forward_kernel<T, V><<<blocks, STYLED_THREADS, 0, stream>>>(a);
}

/* float32, float16 or bfloat16, every pointer to 16 bytes. A piece: pixels of a block, as op/styled.py counts blocks. */
extern "C" int styled_act_cuda(const void *x, const void *factor, const void *noise, const void *strength,
                               const void *bias, const void *output, const void *grad, void *y, void *noise_grad,
                               void *sums, void *strength_sums, int dtype, const int64_t *sizes, double slope,
                               void *stream) {
    auto run = dtype == FLOAT32 ? launch<float> : dtype == FLOAT16 ? launch<__half> : launch<__nv_bfloat16>;
    run(x, factor, noise, strength, bias, output, grad, y, noise_grad, sums, strength_sums, sizes, slope,
        (cudaStream_t)stream);
    return cudaGetLastError();
}
