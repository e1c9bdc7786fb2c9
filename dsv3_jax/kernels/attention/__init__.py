"""Causal attention without an L x L matrix per head.

One public function, `causal_attention`; `reference` materialises the scores, `xla` walks pairs of blocks.
"""

from dsv3_jax.kernels.attention.op import causal_attention

__all__ = ['causal_attention']
