/* Kernels and launcher of op/median.py. */
#include "launch.cuh"
#include "median.h"

template <class T> __global__ void __launch_bounds__(MEDIAN_THREADS) tile_kernel(median_args<T> a) {
    extern __shared__ uint32_t memory[];
    median_block(a, carve(memory, a.size), blockIdx.x, [](auto work) {
        work((int32_t)threadIdx.x);
        __syncthreads();
    });
}

template <class T> __global__ void __launch_bounds__(THREADS) wide_kernel(median_args<T> a, int64_t pixels) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < pixels) median_wide(a, i);
}

static cudaError_t most_bytes(int *bytes) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    return error ? error : cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

template <class T>
static cudaError_t launch(const void *x, void *y, int64_t planes, int32_t height, int32_t width, int32_t size,
                          int32_t replicate, cudaStream_t stream) {
    median_args<T> a = {(const T *)x, (T *)y, height, width, size, replicate};
    int limit;
    cudaError_t error = most_bytes(&limit);
    if (error) return error;
    if (size < 256 - TILE && median_bytes(size) <= limit) {
        int bytes = (int)median_bytes(size);
        error = cudaFuncSetAttribute(tile_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error) return error;
        int64_t tiles = planes * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE);
        tile_kernel<T><<<(unsigned)tiles, MEDIAN_THREADS, bytes, stream>>>(a);
    } else {
        int64_t pixels = planes * height * width;
        wide_kernel<T><<<blocks_for(pixels), THREADS, 0, stream>>>(a, pixels);
    }
    return cudaGetLastError();
}

/* x and y [planes, height, width], contiguous, float32, float16 or bfloat16, height * width below 2**31. */
extern "C" int median_cuda(const void *x, void *y, int dtype, int64_t planes, int height, int width, int size,
                             int replicate, void *stream) {
    auto run = dtype == FLOAT32 ? launch<float> : dtype == FLOAT16 ? launch<__half> : launch<__nv_bfloat16>;
    return run(x, y, planes, height, width, size, replicate, (cudaStream_t)stream);
}
