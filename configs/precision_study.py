"""A small DeepSeek-V3 on which number formats are compared: 1,000 steps of 2,048 tokens of real text.

As appendix B.1 of arXiv 2412.19437, which trains the same models in BF16 and in FP8: same seeds, same
batches, losses smoothed by an exponential average of 0.9, and a relative error that the report bounds by
0.25 %. Its ablations (B.2 and 3.3.2) are drawn beside it:

  python -m dsv3_jax.training.precision_study --config=configs/precision_study.py --workdir=DIR

Every dimension is a multiple of 128 or nearly so, so that tiles are whole. Moments are in BF16 as in the
report; no MTP module, so that a run takes minutes. With 512 tokens a step FP32 was as far from BF16 as any
recipe: too few to tell one from another.
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  c = config.default()
  m = c.model
  m.update(vocab_size=1024, dim=128, ffn_dim=256, num_layers=2, num_dense_layers=1, mtp_depth=0)
  m.update(max_length=128, init_std=0.03, remat='none')
  m.rope.original_length = 128
  m.mla.update(num_heads=2, q_rank=128, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64, block=128)
  m.moe.update(num_experts=8, top_k=2, expert_dim=128, num_groups=4, top_groups=2)
  c.batch.update(seq_len=128, size=16, start_size=16, micro_size=16, ramp_tokens=0.0)
  c.optimizer.update(peak_lr=2e-3, end_lr=2e-4, final_lr=2e-4, warmup_steps=50, ema_decay=0.0)
  c.optimizer.update(constant_tokens=1200e3, decay_tokens=848e3, end_tokens=0.0)
  c.objective.bias_speed = 0.01
  c.run.total_tokens = 2048e3
  return config.variant(c, arg)
