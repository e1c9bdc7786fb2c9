"""How fast router biases move, against a balance loss (arXiv 2412.19437, 2.1.2 and 4.5.2).

  python launch/sweep.py --config=configs/sweeps/balance.py --workdir=/tmp/balance --at_once=2

On the quickstart's model. The report balances by biases alone but for a tiny loss within sequences. Without either, routing
collapses onto few experts; a strong loss costs quality. Look at `--metric=mean_load` beside bits per byte.
"""

import pathlib
import runpy
from typing import Any

import ml_collections

_BASE = pathlib.Path(__file__).parents[1] / 'quickstart.py'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return runpy.run_path(str(_BASE))['get_config'](arg)


def get_hyper(h: Any) -> list[dict[str, Any]]:
  return h.product(
    [
      h.sweep('objective.bias_speed', [0.0, 1e-3, 1e-2, 1e-1]),
      h.sweep('objective.balance_alpha', [0.0, 1e-4, 1e-2]),
    ]
  )
