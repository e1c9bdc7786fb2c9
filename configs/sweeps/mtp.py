"""Weight and depth of multi-token prediction (arXiv 2412.19437, 2.2 and 4.5.1).

  python launch/sweep.py --config=configs/sweeps/mtp.py --workdir=/tmp/mtp --at_once=2

On the quickstart's model. Depth 0 has no use for a weight, so it is one point of its own. The late weight is a third, as in the
report (0.3, then 0.1).
"""

import pathlib
import runpy
from typing import Any

import ml_collections

_BASE = pathlib.Path(__file__).parents[1] / 'quickstart.py'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return runpy.run_path(str(_BASE))['get_config'](arg)


def get_hyper(h: Any) -> list[dict[str, Any]]:
  weights = [0.1, 0.3, 1.0]
  deep = h.product(
    [
      h.sweep('model.mtp_depth', [1, 2]),
      h.zipit(
        [
          h.sweep('objective.mtp_weight', weights),
          h.sweep('objective.mtp_weight_late', [w / 3 for w in weights]),
        ]
      ),
    ]
  )
  return h.chainit([h.fixed('model.mtp_depth', 0), deep])
