r"""DeepSeek-V2-Lite, 15.7B parameters of which 2.4B act on a token (arXiv 2405.04434, appendix B).

The small one of the family, and the size of the V3 report's small ablations (arXiv 2412.19437,
section 4.5): queries are projected directly, without a latent; the router is a plain softmax over
64 experts without groups, and chosen experts' weights are neither normalised nor scaled.

  python -m dsv3_jax.train --config=configs/deepseek_v2_16b.py --workdir=WORKDIR \
    --config.mesh.data=4 --config.mesh.local=8 --config.mesh.zero=3 \
    --config.batch.micro_size=96 --config.data.corpus=CORPUS --config.data.tokenizer=FILE

Append `:debug` to the config's name for a model of the same kind in seconds on a laptop. The V3
report's ablation of balancing without an auxiliary loss is this model with

  --config.model.moe.scoring=sigmoid --config.model.moe.normalize --config.objective.bias_speed=1e-3

against the same with `bias_speed=0` and a balance loss (Table 5: 0.724 against 0.727 bits per byte
on the Pile test set after 1.33T tokens).

Training: length 4,096 is V2-Lite's, the 0.003 of the balance loss V2's; learning rate, batch,
tokens and AdamW are V3's, from the defaults.

Expected: 15,706,484,224 parameters; 16.4 GFLOP a token.
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  c = config.default()
  m = c.model
  m.update(vocab_size=102_400, dim=2048, ffn_dim=10_944, num_layers=27, num_dense_layers=1)
  m.mtp_depth = 0
  m.rope.update(mscale=0.707, mscale_all_dim=0.707)
  m.mla.update(num_heads=16, q_rank=0)
  m.moe.update(num_experts=64, num_shared=2, top_k=6, expert_dim=1408)
  m.moe.update(num_groups=1, top_groups=1, scoring='softmax', normalize=False, route_scale=1.0)
  m.moe.dispatch.payload = 'bf16'
  c.objective.update(balance_alpha=3e-3, bias_speed=0.0)
  return config.variant(c, arg)
