"""Every token to every device of the expert group, and the sums scattered back: for few devices.

Bytes grow with the group and not with the experts that a token chose. Sums are made on the way, so they
cannot be coded: only what goes out is.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.mesh import EXPERTS
from dsv3_jax.parallel import wire
from dsv3_jax.parallel.exchange import Arrived, hold


@dataclasses.dataclass(frozen=True)
class Everywhere:
  """As `exchange.Exchange`, by an all-gather and a reduce-scatter; these have no parts to stand between."""

  here: int  # experts of one device
  payload: str  # wire format of activations, and of gradients of outputs

  def send(
    self, x_TD: jax.Array, ids_TK: jax.Array, weight_TK: jax.Array, beside: Any = ()
  ) -> tuple[Arrived, Any]:
    local_RK = _gather(ids_TK) - self.here * lax.axis_index(EXPERTS)
    mine_RK = (local_RK >= 0) & (local_RK < self.here)
    ids_RK = jnp.where(mine_RK, local_RK, self.here)
    x_RD = _gather_coded(self.payload, x_TD)
    return Arrived(x_RD, ids_RK, _gather(weight_TK), []), beside

  def arrive(self, sent: Arrived, beside: Any = ()) -> tuple[Arrived, Any]:
    x_RD, beside = hold(sent.x_RD, beside)
    return dataclasses.replace(sent, x_RD=x_RD), beside

  def load(self, arrived: Arrived, y_RD: jax.Array, beside: Any = ()) -> tuple[jax.Array, Any]:
    del arrived
    return hold(y_RD, beside)

  def back(self, arrived: Arrived, y_RD: jax.Array, beside: Any = ()) -> tuple[jax.Array, Any]:
    del arrived
    return _sum_scatter(self.payload, y_RD), beside

  def home(self, returned: jax.Array, beside: Any = ()) -> tuple[jax.Array, Any]:
    return hold(returned, beside)


class Home(Everywhere):
  """The way of one device that has all experts: none."""

  def send(
    self, x_TD: jax.Array, ids_TK: jax.Array, weight_TK: jax.Array, beside: Any = ()
  ) -> tuple[Arrived, Any]:
    return Arrived(x_TD, ids_TK, weight_TK, []), beside

  def back(self, arrived: Arrived, y_RD: jax.Array, beside: Any = ()) -> tuple[jax.Array, Any]:
    del arrived
    return y_RD, beside


def _gather(x_TX: jax.Array) -> jax.Array:
  return lax.all_gather(x_TX, EXPERTS, axis=0, tiled=True)  # [T, .] -> [n T, .]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_coded(payload, x_TD):
  """[T, D] -> [n T, D] by way of the payload's format; its gradient is a plain reduce-scatter."""
  rows = checkpoint_name(_gather(wire.encode(x_TD, payload)), 'dispatched')
  return wire.decode(rows, payload, x_TD.shape[1], x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_scatter(payload, y_RD):
  """[n T, D] -> [T, D], summed over the group; its gradient goes by way of the payload's format."""
  return lax.psum_scatter(y_RD, EXPERTS, scatter_dimension=0, tiled=True)


_gather_coded.defvjp(
  lambda payload, x_TD: (_gather_coded(payload, x_TD), None),
  lambda payload, _, dx_RD: (_sum_scatter(payload, dx_RD),),
)
_sum_scatter.defvjp(
  lambda payload, y_RD: (_sum_scatter(payload, y_RD), None),
  lambda payload, _, dy_TD: (_gather_coded(payload, dy_TD),),
)
