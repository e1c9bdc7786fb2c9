r"""DeepSeek-V2, 236B parameters of which 21B act on a token (arXiv 2405.04434).

What V2 has not: sigmoid routing with a bias, MTP, and chosen experts' weights that sum to 1. A
group of experts counts by its best one, and a token keeps 3 of 8 groups.

  python -m dsv3_jax.train --config=configs/deepseek_v2_236b.py --workdir=WORKDIR \
    --config.mesh.data=16 --config.mesh.node=8 --config.mesh.local=4 --config.mesh.zero=3 \
    --config.batch.micro_size=512 --config.data.corpus=CORPUS --config.data.tokenizer=FILE

Append `:debug` to the config's name for a model of the same kind in seconds on a laptop.

Training: length 4,096 and the 0.003 of the balance loss are V2's (there it is the first of three
losses, over experts; here it is taken within each sequence). Learning rate, batch, tokens and AdamW
are V3's, from the defaults. YaRN scales the softmax by 0.0707 ln(40) + 1, squared, as the V2 report
writes it, once `model.max_length` exceeds 4,096; V3 has 0.1 in place of 0.0707.

Expected: 235,741,434,880 parameters; 155.0 GFLOP a token (arXiv 2505.09343, Table 2).
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  c = config.default()
  m = c.model
  m.update(vocab_size=102_400, dim=5120, ffn_dim=12_288, num_layers=60, num_dense_layers=1)
  m.mtp_depth = 0
  m.rope.update(mscale=0.707, mscale_all_dim=0.707)
  m.moe.update(num_experts=160, num_shared=2, top_k=6, expert_dim=1536)
  m.moe.update(num_groups=8, top_groups=3, scoring='softmax', normalize=False, route_scale=16.0)
  m.moe.dispatch.payload = 'bf16'
  c.objective.update(balance_alpha=3e-3, bias_speed=0.0)
  return config.variant(c, arg)
