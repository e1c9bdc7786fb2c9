"""The quickstart shrunk: every mechanism of the system in seconds, to try code out.

  python -m dsv3_jax.train --config=configs/debug.py --workdir=/tmp/debug

3 layers of width 32, 8 experts, 20 steps of 8 sequences of 32 tokens. Any other config shrinks to
the same sizes with `:debug` behind its name, keeping its kind: `configs/deepseek_v2_16b.py:debug`.

Expected: the cross entropy starts at about ln(512) = 6.24 nats per token and falls.
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  c = config.debug(config.default())
  c.model.update(precision='fp32', remat='none', init_std=0.02)
  c.optimizer.update(moments='fp32', ema_decay=0.9)
  c.objective.bias_speed = 0.01
  return config.variant(c, arg)
