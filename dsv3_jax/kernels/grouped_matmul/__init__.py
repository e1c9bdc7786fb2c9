"""FP8 matmuls of experts, each on its own rows: contiguous groups (training), masked (decode)."""

from dsv3_jax.kernels.grouped_matmul.op import (
  aligned_slots,
  aligned_starts,
  grouped_matmul,
  masked_matmul,
)

__all__ = ['aligned_slots', 'aligned_starts', 'grouped_matmul', 'masked_matmul']
