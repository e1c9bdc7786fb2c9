"""SwiGLU, times the router's weight, straight to FP8; and its gradient from stored inputs."""

from dsv3_jax.kernels.swiglu_quantize.op import swiglu_backward, swiglu_quantize

__all__ = ['swiglu_backward', 'swiglu_quantize']
