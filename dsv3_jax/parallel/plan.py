"""What an exchange of tokens and experts needs on a mesh, in plain numbers: rows, buffers, bytes.

Everything here follows from the config, the tokens of a device and the mesh; nothing from the routing of
the moment, which only says how many rounds are run.

Per device, layer and round of two_hop at V3's sizes (8 x 8 devices, 4,096 tokens, capacity 1.25): 2,560
rows go to each of 7 nodes, of 7,272 bytes in FP8 (7,168 codes, 56 exponents, 8 ids, 8 weights).
"""

import dataclasses

from dsv3_jax import config
from dsv3_jax.parallel import wire
from dsv3_jax.parallel.rounds import capacity, chunk_size

_ID_BYTES, _WEIGHT_BYTES = 2, 4


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one form's buffers, in rows. A limit of None cannot be exceeded."""

  form: str
  tokens: int  # of a device
  node: int
  local: int
  here: int  # experts of a device
  top_k: int
  fan_out: int  # devices that one token can need
  payload: str
  combine: str
  node_rows: int  # two_hop: from a device to one node
  device_rows: (
    int  # two_hop: from a forwarder to one device; flat: from a device to one; ragged: into one
  )
  choices: int  # (row, expert) pairs of a device
  node_limit: int | None
  device_limit: int | None
  choices_limit: int | None

  @property
  def devices(self) -> int:
    return self.node * self.local

  @property
  def share(self) -> float:
    """Part of all tokens that goes to one device under even routing, at most."""
    return self.fan_out / self.devices

  @property
  def columns(self) -> int:
    """Experts of one device that one token can choose."""
    return min(self.top_k, self.here)

  def bytes(self, dim: int, dtype: str, *, backward: bool = False) -> dict[str, int]:
    """Bytes that a device sends in a round, out and back, by axis: {'node': .., 'local': ..}.

    Of ragged: what even routing sends. `backward`: of the gradients' way through the same slots, without
    what remat sends once more.
    """
    if self.form == 'two_hop':
      rows = {
        'node': (self.node - 1) * self.node_rows,
        'local': (self.local - 1) * self.device_rows,
      }
    elif self.form in ('flat', 'ragged'):
      to_each = self.device_rows if self.form == 'flat' else self.tokens * self.share
      rows = {axis: round(n * to_each) for axis, n in self._others().items()}
    else:  # allgather, dense: every token to everybody
      rows = {axis: n * self.tokens for axis, n in self._others().items()}
    each = self.row_bytes(dim, dtype, backward=backward)
    return {axis: n * each for axis, n in rows.items()}

  def row_bytes(self, dim: int, dtype: str, *, backward: bool = False) -> int:
    """Bytes of one row, out and back."""
    out, back = wire.row_bytes(self.payload, dim, dtype), wire.row_bytes(self.combine, dim, dtype)
    if self.form in ('allgather', 'dense'):  # sums that are never coded
      back = wire.row_bytes('plain', dim, dtype)
    weights = _WEIGHT_BYTES * self.top_k
    return out + back + weights + (0 if backward else _ID_BYTES * self.top_k)

  def _others(self) -> dict[str, int]:
    return {'node': self.devices - self.local, 'local': self.local - 1}


def make(c: config.Moe, form: str, tokens: int, node: int, local: int) -> Plan:
  """The plan for so many tokens a device on a mesh of node x local devices."""
  n, K, factor = node * local, c.top_k, c.dispatch.capacity
  here, chunk = c.num_experts // n, chunk_size(tokens)
  columns = min(K, here)
  # A token's groups lie on so many devices, or (several groups on one) on fewer than it has groups.
  fan_out = min(K, n, c.top_groups * max(1, n // c.num_groups))
  share = fan_out / n  # of all tokens that go to one device, under even routing; at most
  node_rows = worst_node = tokens
  if form == 'two_hop':
    # Whole groups lie on a node, so a token's experts lie on no more nodes than it has groups.
    nodes = min(node, K, c.top_groups if c.num_groups % node == 0 else node)
    node_rows = capacity(tokens * nodes / node, factor, chunk, tokens)
    worst_device = node * tokens
    device_rows = capacity(node * tokens * share, factor, node * chunk, worst_device)
  elif form == 'ragged':
    worst_device = n * tokens
    device_rows = capacity(n * tokens * share, factor, n * chunk, worst_device)
  else:
    worst_device = tokens
    device_rows = capacity(tokens * share, factor, chunk, tokens)
  worst_choices = n * tokens * columns
  choices = (
    capacity(tokens * K, factor, n * chunk * columns, worst_choices) if n > 1 else worst_choices
  )
  limit = lambda size, worst: size if size < worst and n > 1 else None
  moved = form in ('two_hop', 'flat', 'ragged')
  return Plan(
    form=form,
    tokens=tokens,
    node=node,
    local=local,
    here=here,
    top_k=K,
    fan_out=fan_out,
    payload=c.dispatch.payload,
    combine=c.dispatch.combine,
    node_rows=node_rows,
    device_rows=device_rows,
    choices=choices,
    node_limit=limit(node_rows, worst_node) if form == 'two_hop' else None,
    device_limit=limit(device_rows, worst_device) if moved else None,
    choices_limit=limit(choices, worst_choices) if form != 'dense' else None,
  )
