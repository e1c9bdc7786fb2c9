"""The format of matmuls, and of the moments between steps (arXiv 2412.19437, 3.3).

  python launch/sweep.py --config=configs/sweeps/precision.py --workdir=/tmp/precision --at_once=2

On the quickstart's model. What each narrower format costs in bits per byte, on one machine and the same data.
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
      h.sweep('model.precision', ['fp32', 'bf16', 'fp8']),
      h.sweep('optimizer.moments', ['fp32', 'bf16']),
    ]
  )
