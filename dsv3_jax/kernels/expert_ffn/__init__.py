"""The SwiGLU experts of one device on the tokens routed to them, dropless.

One public function, `expert_ffn`; `reference` runs every expert on every token, `xla` only what is
routed, `few` is for few tokens.
"""

from dsv3_jax.kernels.expert_ffn.op import expert_ffn, expert_slots

__all__ = ['expert_ffn', 'expert_slots']
