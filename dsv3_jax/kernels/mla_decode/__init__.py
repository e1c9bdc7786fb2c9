"""Absorbed latent attention over a cache in pages: what decode, verification and chunked prefill run.

`mla_decode` attends; `pack` and `unpack` say what a page's entry is; `reference` gathers every entry of a
row, `xla` walks them in blocks, the kernels for chips page by page through the table.
"""

from dsv3_jax.kernels.mla_decode.entries import PAGE, entry_size, pack, unpack
from dsv3_jax.kernels.mla_decode.op import mla_decode

__all__ = ['PAGE', 'entry_size', 'mla_decode', 'pack', 'unpack']
