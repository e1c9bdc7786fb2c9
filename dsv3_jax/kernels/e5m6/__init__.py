"""E5M6, 12 bits: storage of the attention's output between forward and backward (3.3.3)."""

from dsv3_jax.kernels.e5m6.op import decode, encode, row_bytes

__all__ = ['decode', 'encode', 'row_bytes']
