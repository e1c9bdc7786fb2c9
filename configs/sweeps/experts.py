"""Many small experts or few large ones, at the same compute (arXiv 2401.06066; 2412.19437, 2.1.2).

  python launch/sweep.py --config=configs/sweeps/experts.py --workdir=/tmp/experts --at_once=2

On the quickstart's model. Experts of half the width come in twice the number, and twice as many serve a token: parameters and FLOPs
stay. The last sweep adds experts without adding compute.
"""

import pathlib
import runpy
from typing import Any

import ml_collections

_BASE = pathlib.Path(__file__).parents[1] / 'quickstart.py'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return runpy.run_path(str(_BASE))['get_config'](arg)


def get_hyper(h: Any) -> list[dict[str, Any]]:
  split = h.zipit(
    [
      h.sweep('model.moe.num_experts', [4, 8, 16, 32]),
      h.sweep('model.moe.expert_dim', [512, 256, 128, 64]),
      h.sweep('model.moe.top_k', [1, 2, 4, 8]),
    ]
  )
  more = h.product(
    [
      h.sweep('model.moe.num_experts', [16, 32]),
      h.fixed('model.moe.expert_dim', 256),
      h.fixed('model.moe.top_k', 2),
    ]
  )
  return h.product(
    [
      h.fixed('model.moe.num_groups', 1),
      h.fixed('model.moe.top_groups', 1),
      h.chainit([split, more]),
    ]
  )
