"""Gradients of weights in FP8: tiles of 128 tokens on both operands, FP32 out, accumulating (3.3.2)."""

from dsv3_jax.kernels.fp8_wgrad.op import fp8_wgrad

__all__ = ['fp8_wgrad']
