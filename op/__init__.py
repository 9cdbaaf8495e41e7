"""Tensor operations that the models are built from. Each op in one file, its reference beside its fast paths."""

from op.between import raised, scaled_sum, styled_act
from op.bias_act import bias_act
from op.conv import conv2d
from op.cuda import set_impl
from op.modulated_conv import modulated_conv2d
from op.upfirdn2d import binomial_kernel, upfirdn2d

__all__ = ["bias_act", "binomial_kernel", "conv2d", "modulated_conv2d", "raised", "scaled_sum", "set_impl",
           "styled_act", "upfirdn2d"]
