"""Gradients of experts' weights in FP8, each over its own tokens; FP32 out, accumulating."""

from dsv3_jax.kernels.grouped_wgrad.op import grouped_wgrad

__all__ = ['grouped_wgrad']
