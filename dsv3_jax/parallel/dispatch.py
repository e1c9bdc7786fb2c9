"""Brings tokens to their experts and the results back, whatever the mesh; nothing is ever dropped.

| form      | what crosses a link                                             | for                       |
|-----------|-----------------------------------------------------------------|---------------------------|
| two_hop   | a token once to each node that it needs, then inside the node   | groups over several nodes |
| flat      | a token once to each device that it needs                       | many devices in one node  |
| allgather | every token to every device of the group                        | few devices               |
| ragged    | as flat, no padding: `lax.ragged_all_to_all`; not on CPU         | comparison                |
| dense     | as allgather, and every expert sees every token                 | oracle                    |
| auto      | two_hop, allgather or flat, by the mesh (`choose`)              |                           |

All serve training, prefill and decode, and give the same numbers. Experts lie over (node, local), node
first. Payloads are encoded even where a row stays at home, so results do not depend on the mesh's shape
more than on its being larger than one device; with one device nothing is encoded.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import config
from dsv3_jax.mesh import EXPERTS
from dsv3_jax.parallel import rounds
from dsv3_jax.parallel.everywhere import Everywhere, Home
from dsv3_jax.parallel.exchange import Arrived, Exchange
from dsv3_jax.parallel.hop import Leg
from dsv3_jax.parallel.plan import Plan
from dsv3_jax.parallel.plan import make as make_plan
from dsv3_jax.parallel.rounds import Bound
from dsv3_jax.precision import recipe

# What experts give in any form, and what makes y [t, D] of it: the sum over a token's choices may wait.
Outputs = tuple[jax.Array, Callable[[jax.Array], jax.Array]]
# (weights, x [t, D], ids [t, K] of experts here, weight [t, K], bound) -> outputs. The id one past the last
# expert is "not here"; at most `bound` ids are (None: all may be). Takes what it needs by argument.
Experts = Callable[[Any, jax.Array, jax.Array, jax.Array, int | None], Outputs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
  """Where one device's tokens went in one layer."""

  nodes: jax.Array  # float32: sum over tokens of the nodes with experts of theirs, home included
  devices: jax.Array  # float32: the same of devices
  rounds: jax.Array  # int32, the same on every device; of several dispatches their sum


def figures(
  c: config.Model, traffic: Traffic, mesh: config.Mesh, tokens: int, dispatches: jax.Array
) -> dict[str, jax.Array]:
  """Means over layers of a step's traffic, as metrics; nothing where nothing moves.

  `traffic`: [layers], summed over `dispatches` of `tokens` tokens on every device of the mesh. The bytes
  are what one device sends along an axis in the whole step, forward and backward, padding included, what
  remat sends once more left out.
  """
  if mesh.node * mesh.local == 1:
    return {}
  devices = mesh.data * mesh.node * mesh.local
  total = (dispatches * (tokens * devices)).astype(jnp.float32)
  rounds_Y = traffic.rounds.astype(jnp.float32) / devices
  told = {
    'nodes_per_token': jnp.mean(traffic.nodes) / total,
    'devices_per_token': jnp.mean(traffic.devices) / total,
    'rounds': jnp.mean(rounds_Y) / dispatches.astype(jnp.float32),
  }
  form, _ = choose(c.moe, mesh.node, mesh.local)
  plan = make_plan(c.moe, form, tokens, mesh.node, mesh.local)
  dtype = recipe.compute_dtype(c.precision)
  there, back = plan.bytes(c.dim, dtype), plan.bytes(c.dim, dtype, backward=True)
  return told | {f'{a}_bytes': jnp.sum(rounds_Y) * float(there[a] + back[a]) for a in EXPERTS}


def choose(c: config.Moe, node: int, local: int) -> tuple[str, str]:
  """The form that runs on so many nodes and devices in each, and why."""
  if c.dispatch.form != 'auto':
    return c.dispatch.form, 'asked for'
  if node * local == 1:
    return 'allgather', 'one device has all experts, nothing moves'
  if node > 1 and c.num_groups % node == 0:
    return 'two_hop', f'{node} nodes: a token crosses to each at most once'
  if node * local <= c.top_k and not c.dispatch.combine.startswith('logfmt'):
    return 'allgather', f'{node * local} devices, no more than the {c.top_k} experts of a token'
  return 'flat', f'{node * local} devices for the {c.top_k} experts of a token'


def check(c: config.Moe, device_mesh: jax.sharding.Mesh) -> None:
  """ConfigError for a form that the mesh's devices cannot run."""
  if c.dispatch.form == 'ragged' and device_mesh.devices.flat[0].platform == 'cpu':
    raise config.ConfigError(
      "model.moe.dispatch.form = 'ragged': XLA has no ragged all-to-all on CPU; use 'auto'"
    )


def describe(c: config.Moe, device_mesh: jax.sharding.Mesh) -> str:
  """'dispatch: two_hop (why); fp8 out, bf16 back'."""
  node, local = (device_mesh.shape[a] for a in EXPERTS)
  form, why = choose(c, node, local)
  if node * local == 1:
    return f'dispatch: {why}'
  return f'dispatch: {form} ({why}); {c.dispatch.payload} out, {c.dispatch.combine} back'


def dispatch(
  c: config.Moe,
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  experts: Experts,
  weights: Any,
) -> tuple[jax.Array, Traffic]:
  """Weighted sum of the chosen experts' outputs for this device's tokens -> [T, D]; where they went.

  `weights` go to `experts` as its first argument: gradients reach them through it alone. Every leaf of
  theirs starts with a dimension over the experts of this device.
  """
  trip = Trip.start(c, x_TD, ids_TK, weight_TK)
  return trip.finish(trip.there_and_back(experts, weights), experts, weights)


@dataclasses.dataclass(frozen=True)
class Trip:
  """One dispatch in steps, so that something else can be computed beside them.

  send, arrive, run, load, back, home, finish; `there_and_back` is all but the last at once.
  """

  plan: Plan
  rounds: rounds.Rounds | None  # None: one round is enough, whatever the routing
  x_TD: jax.Array
  ids_TK: jax.Array
  weight_TK: jax.Array

  @classmethod
  def start(cls, c: config.Moe, x_TD: jax.Array, ids_TK: jax.Array, weight_TK: jax.Array) -> 'Trip':
    node, local = (lax.axis_size(a) for a in EXPERTS)
    form, _ = choose(c, node, local)
    plan = make_plan(c, form, len(x_TD), node, local)
    bounds = _bounds(plan, ids_TK)
    return cls(plan, rounds.plan(bounds, len(x_TD)) if bounds else None, x_TD, ids_TK, weight_TK)

  @property
  def held(self) -> tuple[jax.Array, jax.Array]:
    """What to hold back so that nothing is sent before; `after` puts it in again."""
    return self.x_TD, self.weight_TK

  def after(self, held: tuple[jax.Array, jax.Array]) -> 'Trip':
    return dataclasses.replace(self, x_TD=held[0], weight_TK=held[1])

  def send(self, beside: Any = ()) -> tuple[Any, Any]:
    """The first round's rows, on their way; `beside` is what is computed meanwhile, as in all steps."""
    ids_TK = self.ids_TK
    if self.rounds:
      ids_TK = self.rounds.live(ids_TK, 0, self.rounds.first_end)
    return _way(self.plan).send(self.x_TD, ids_TK, self.weight_TK, beside)

  def arrive(self, sent: Any, beside: Any = ()) -> tuple[Arrived, Any]:
    """Rows on the devices of their experts."""
    arrived, beside = _way(self.plan).arrive(sent, beside)
    ids_RJ, weight_RJ = _compact(self.plan, arrived.ids_RK, arrived.weight_RK)
    return dataclasses.replace(arrived, ids_RK=ids_RJ, weight_RK=weight_RJ), beside

  def there_and_back(self, experts: Experts, weights: Any) -> jax.Array:
    """The first round."""
    arrived, _ = self.arrive(self.send()[0])
    loaded, _ = self.load(arrived, self.run(arrived, experts, weights))
    returned, _ = self.back(arrived, loaded)
    return self.home(returned)[0]

  def run(self, arrived: Arrived, experts: Experts, weights: Any) -> jax.Array:
    """Weighted sums of the outputs of the experts here -> [R, D]."""
    rows = arrived.x_RD, arrived.ids_RK, arrived.weight_RK
    outputs, total = experts(weights, *rows, self.plan.choices)
    return total(outputs)

  def run_halves(
    self, arrived: Arrived, experts: Experts, weights: Any
  ) -> tuple[Callable[[jax.Array], Outputs], Callable[[jax.Array], Outputs]]:
    """`run` as two functions of the rows [R, D], each with half of the experts; their results add up."""
    here, half = self.plan.here, self.plan.here // 2

    def run(first: int, end: int, x_RD: jax.Array) -> Outputs:
      mine_RJ = (arrived.ids_RK >= first) & (arrived.ids_RK < end)
      ids_RJ = jnp.where(mine_RJ, arrived.ids_RK - first, end - first)
      part = jax.tree.map(lambda w: w[first:end], weights)
      return experts(part, x_RD, ids_RJ, arrived.weight_RK, self.plan.choices)

    if not half:
      nothing = lambda x_RD: (jnp.zeros_like(x_RD), lambda y_RD: y_RD)
      return nothing, functools.partial(run, 0, here)
    return functools.partial(run, 0, half), functools.partial(run, half, here)

  def load(self, arrived: Arrived, y_RD: jax.Array, beside: Any = ()) -> tuple[Any, Any]:
    """The experts' outputs, ready to leave; with `beside`, what follows from it stands beside their way."""
    return _way(self.plan).load(arrived, y_RD, beside)

  def back(self, arrived: Arrived, loaded: Any, beside: Any = ()) -> tuple[Any, Any]:
    """The experts' outputs, on their way."""
    return _way(self.plan).back(arrived, loaded, beside)

  def home(self, returned: Any, beside: Any = ()) -> tuple[jax.Array, Any]:
    """The first round's sums [T, D]; zeros for tokens of later rounds."""
    return _way(self.plan).home(returned, beside)

  def finish(self, y_TD: jax.Array, experts: Experts, weights: Any) -> tuple[jax.Array, Traffic]:
    """Adds what needs further rounds -> [T, D]; where the tokens went."""
    plan, number = self.plan, jnp.int32(1)
    if self.rounds:
      again = functools.partial(_round, plan, experts)
      operands = self.x_TD, self.ids_TK, self.weight_TK, weights
      y_TD, number = rounds.further(again, self.rounds, y_TD, *operands)
    device_TK = self.ids_TK // plan.here
    total = lambda member_TK, members: jnp.sum(_chosen(member_TK, members).astype(jnp.float32))
    nodes, devices = total(device_TK // plan.local, plan.node), total(device_TK, plan.devices)
    return y_TD, Traffic(nodes, devices, number)


def _round(plan, experts, x_TD, ids_TK, weight_TK, weights):
  """One round from home to home."""
  return Trip(plan, None, x_TD, ids_TK, weight_TK).there_and_back(experts, weights)


def _way(plan: Plan) -> Exchange | Everywhere | Home:
  if plan.devices == 1:
    return Home(plan.here, plan.payload)
  if plan.form in ('allgather', 'dense'):
    return Everywhere(plan.here, plan.payload)
  if plan.form == 'two_hop':
    legs = Leg(('node',), plan.local, plan.node_rows), Leg(('local',), 1, plan.device_rows)
  else:
    legs = (Leg(EXPERTS, 1, plan.device_rows, ragged=plan.form == 'ragged'),)
  return Exchange(legs, plan.here, plan.payload, plan.combine)


def _compact(plan: Plan, ids_RK: jax.Array, weight_RK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The choices of each row that are here, in as few columns as there can be -> [R, J] each."""
  if plan.columns == plan.top_k:
    return ids_RK, weight_RK
  order_RJ = jnp.argsort(ids_RK, axis=1, stable=True)[:, : plan.columns]
  take = lambda x: jnp.take_along_axis(x, order_RJ, axis=1)
  return take(ids_RK), take(weight_RK)


# ---- counts --------------------------------------------------------------------------------------


def _bounds(plan: Plan, ids_TK: jax.Array) -> list[Bound]:
  """What a run of tokens may put into the buffers of one round."""
  device_TK = ids_TK // plan.here
  device_Tn = _chosen(device_TK, plan.devices)
  bounds = []
  if plan.node_limit:
    node_Tn = _chosen(device_TK // plan.local, plan.node)
    bounds.append(Bound(node_Tn, (), plan.node_limit))
  if plan.device_limit:
    # Rows for one device meet at its forwarder; those of a flat exchange nowhere.
    meets = {'two_hop': ('node',), 'flat': (), 'ragged': EXPERTS}[plan.form]
    bounds.append(Bound(device_Tn, meets, plan.device_limit))
  if plan.choices_limit:
    devices = jnp.arange(plan.devices, dtype=jnp.int32)[None, None]
    choices_Tn = jnp.sum(device_TK[:, :, None] == devices, axis=1)
    bounds.append(Bound(choices_Tn, EXPERTS, plan.choices_limit))
  return bounds


def _chosen(member_TK: jax.Array, members: int) -> jax.Array:
  """Whether any choice of a token lies on each member -> bool [T, members]."""
  each = jnp.arange(members, dtype=jnp.int32)[None, None]
  return jnp.any(member_TK[:, :, None] == each, axis=1)
