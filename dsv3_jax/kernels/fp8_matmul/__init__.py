"""Activations by weights in FP8: tiles of 1x128 times blocks of 128x128, sums in FP32 (3.3.2)."""

from dsv3_jax.kernels.fp8_matmul.op import fp8_matmul

__all__ = ['fp8_matmul']
