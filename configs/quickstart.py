"""The whole system in minutes on two CPU cores: a small DeepSeek-V3 that learns to write Python.

As in arXiv 2412.19437: MLA with both latents, 8 routed experts in 4 groups of which 2 run beside a
shared one, a router bias that balances them, an MTP module, and the report's schedules squeezed into
1.3M tokens. The text is the standard library of the Python that runs it, so nothing
is downloaded.

  python -m dsv3_jax.train --config=configs/quickstart.py --workdir=/tmp/quickstart

Other sizes and choices by flags, such as `--config.model.num_layers=6` or
`--config.objective.bias_speed=0`; `configs/quickstart.py:debug` takes seconds.
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  c = config.default()
  m = c.model
  m.update(vocab_size=4096, dim=256, ffn_dim=1024, num_layers=3, num_dense_layers=1)
  m.update(max_length=1024, init_std=0.03, precision='fp32', remat='none', unroll=2)
  m.rope.original_length = 1024  # no YaRN, which extends what was trained on less
  m.mla.update(num_heads=4, q_rank=128, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64, block=128)
  m.moe.update(num_experts=8, top_k=2, expert_dim=256, num_groups=4, top_groups=2)
  c.batch.update(seq_len=256, size=16, start_size=16, micro_size=16, ramp_tokens=0.0)

  # The report's phases in its proportions, and its learning rates, all higher for a small model.
  share = 1.3e6 / c.run.total_tokens
  c.run.total_tokens = 1.3e6
  for phase in ('constant_tokens', 'decay_tokens', 'end_tokens'):
    c.optimizer[phase] = round(share * c.optimizer[phase], -3)
  for limit in ('mtp_late_tokens', 'bias_stop_tokens'):
    c.objective[limit] = round(share * c.objective[limit], -3)
  c.optimizer.update(peak_lr=2e-3, end_lr=2e-4, final_lr=6.6e-5, warmup_steps=20)

  # 318 steps: the bias must move faster, and the average of the weights reach back less far.
  c.objective.bias_speed = 0.01
  c.optimizer.update(moments='fp32', ema_decay=0.98)
  c.checkpoint.every_steps = 150
  c.run.update(log_every=5, eval_every=150, eval_bytes=200_000)
  return config.variant(c, arg)
