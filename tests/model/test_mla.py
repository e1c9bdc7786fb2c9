"""Multi-head Latent Attention, as training computes it, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

_CASES = {
  'compressed_queries': {},
  'direct_queries': {'model.mla.q_rank': 0},
  'yarn': {'model.max_length': 128, 'model.rope.mscale': 0.5},
  'odd_sizes': {
    'model.mla.num_heads': 3,
    'model.mla.nope_dim': 5,
    'model.mla.rope_dim': 6,
    'model.mla.v_dim': 7,
    'model.mla.q_rank': 11,
    'model.mla.kv_rank': 9,
    'model.mla.block': 4,
  },
}


@pytest.mark.parametrize('changes', _CASES.values(), ids=_CASES)
def test_attention_and_what_a_cache_keeps_equal_the_oracle(changes):
  c = parity.small(changes | {'model.num_layers': 2, 'model.mtp_depth': 0})
  state = parity.random_state(c)
  attn = parity.layout(c).module(state['params'], state['router_bias']).moe_layers.attn
  attn = jax.tree.map(lambda x: jnp.asarray(x[0]), attn)
  x_BLD = np.random.default_rng(1).normal(size=(2, 18, c.model.dim)).astype(np.float32)

  def run(attn, x_BLD):
    positions_BL = jnp.arange(18, dtype=jnp.int32)[None]
    return attn(c.model, x_BLD), attn.latents(c.model, x_BLD, positions_BL)

  out_BLD, (latent_BLC, k_rope_BLR) = parity.on_one_device(run)(attn, x_BLD)
  w = parity.to_oracle(state)['moe_layers'][0]['attn']
  for b, x_LD in enumerate(x_BLD.astype(np.float64)):
    parity.assert_close(out_BLD[b], oracle.mla(c.model, w, x_LD))
    kept = [oracle.mla_latent(c.model, w, x_D, t) for t, x_D in enumerate(x_LD)]
    parity.assert_close(latent_BLC[b], np.array([latent_C for latent_C, _ in kept]))
    parity.assert_close(k_rope_BLR[b], np.array([k_rope_R for _, k_rope_R in kept]))
