"""LogFMT-nBit: `encode` and `decode` of tiles of 1x128 with codes spaced evenly in the logarithm.

Implementations: `xla`, `mosaic_gpu`, `pallas_tpu`. What it computes is what arXiv 2505.09343 describes for the combine.
"""

from dsv3_jax.kernels.logfmt.op import decode, encode

__all__ = ['decode', 'encode']
