"""Output head and cross entropy in one, without a [tokens, vocabulary] matrix in memory."""

from dsv3_jax.kernels.cross_entropy.op import cross_entropy

__all__ = ['cross_entropy']
