/* Types and launch helpers of the .cu files. A launcher has C linkage and returns a cudaError_t, 0 for success. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "portable.h"

HD float widen(__half value) { return __half2float(value); }
HD float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <> HD __half narrow<__half>(float value) { return __float2half_rn(value); }
template <> HD __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

enum { THREADS = 256, PACK_BYTES = 16 };

/* As op/build.py numbers them. */
enum dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT64 = 3 };

static inline bool is_packed(const void *pointer) { return (uintptr_t)pointer % PACK_BYTES == 0; }
static inline unsigned blocks_for(int64_t threads, int block = THREADS) {
    return (unsigned)((threads + block - 1) / block);
}
