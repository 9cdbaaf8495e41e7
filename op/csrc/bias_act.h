/* gain * leaky_relu(x + bias) and its derivative, V neighbours in memory a thread. */
#pragma once

#include "portable.h"

/* Element i belongs to channel i / inner % channels: inner is H * W for NCHW and 1 for channels-last. */
template <class T> struct bias_act_args {
    typedef typename accumulator<T>::type A;
    const T *x;       /* the input; of the derivative: the gradient with respect to the output */
    const A *bias;    /* [channels], or null */
    const T *output;  /* null, or (of the derivative) the output, whose sign tells the branch taken */
    T *y;
    int64_t channels, inner;
    A slope, gain;
};

/* V divides inner, or inner is 1 and V divides channels: a pack never straddles a channel or a pixel. */
template <class T, int V, class Index> HD void bias_act(const bias_act_args<T> &a, Index thread) {
    typedef typename accumulator<T>::type A;
    Index i = thread * V;
    pack<T, V> x = *(const pack<T, V> *)(a.x + i), y;
    Index channel = i / (Index)a.inner % (Index)a.channels;
    Index step = a.inner == 1;
    UNROLL for (int j = 0; j < V; j++) {
        A value = widen(x.v[j]);
        if (a.bias) value += a.bias[channel + step * j];
        y.v[j] = narrow<T>(value * (value > 0 ? a.gain : a.gain * a.slope));
    }
    *(pack<T, V> *)(a.y + i) = y;
}

template <class T, int V, class Index> HD void bias_act_grad(const bias_act_args<T> &a, Index thread) {
    typedef typename accumulator<T>::type A;
    Index i = thread * V;
    pack<T, V> x = *(const pack<T, V> *)(a.x + i), output = *(const pack<T, V> *)(a.output + i), y;
    UNROLL for (int j = 0; j < V; j++) {
        A factor = widen(output.v[j]) > 0 ? a.gain : a.gain * a.slope;
        y.v[j] = narrow<T>(widen(x.v[j]) * factor);
    }
    *(pack<T, V> *)(a.y + i) = y;
}
