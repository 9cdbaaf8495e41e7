"""Tensor operations that the models are built from, each with its reference in the file that it is imported from.

Beside it is its fast path, but for those that ops share: fused.py (a CPU's, of between.py and bias_act.py), styled.py
(a GPU's, of between.py) and winograd.py (of conv.py).
"""

from op.between import enlarged_beside, scaled_sum, styled_act
from op.bias_act import bias_act
from op.conv import conv2d, ready
from op.cuda import set_impl
from op.modulated_conv import folding_pays, modulated_conv2d, modulated_product, prepared
from op.upfirdn2d import binomial_kernel, upfirdn2d

__all__ = ["bias_act", "binomial_kernel", "conv2d", "enlarged_beside", "folding_pays", "modulated_conv2d",
           "modulated_product", "prepared", "ready", "scaled_sum", "set_impl",
           "styled_act", "upfirdn2d"]
