"""The peak of the learning rate, and how long it warms up (arXiv 2412.19437, 4.2).

  python launch/sweep.py --config=configs/sweeps/learning_rate.py --workdir=/tmp/learning_rate --at_once=2

On the quickstart's model. The end and the final rate keep the report's proportions to the peak: a tenth and a thirtieth.
"""

import pathlib
import runpy
from typing import Any

import ml_collections

_BASE = pathlib.Path(__file__).parents[1] / 'quickstart.py'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return runpy.run_path(str(_BASE))['get_config'](arg)


def get_hyper(h: Any) -> list[dict[str, Any]]:
  peaks = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
  return h.product(
    [
      h.zipit(
        [
          h.sweep('optimizer.peak_lr', peaks),
          h.sweep('optimizer.end_lr', [p / 10 for p in peaks]),
          h.sweep('optimizer.final_lr', [p / 30 for p in peaks]),
        ]
      ),
      h.sweep('optimizer.warmup_steps', [20, 80]),
    ]
  )
