/* What the kernels and their emulation on the CPU share. The work of one thread (or of one thread between two
 * barriers) is an inline function that both compilers accept: nvcc puts it into a kernel, and the tests, with g++,
 * into loops over an imagined grid. */
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HD inline
#define UNROLL
#endif
#define RESTRICT __restrict__

/* The type that sums and products are formed in. */
template <class T> struct accumulator { typedef float type; };
template <> struct accumulator<double> { typedef double type; };

HD float widen(float value) { return value; }
HD double widen(double value) { return value; }

template <class T> HD T narrow(typename accumulator<T>::type value) { return (T)value; }

/* V neighbours in memory, moved by one instruction. */
template <class T, int V> struct alignas(sizeof(T) * V) pack { T v[V]; };
