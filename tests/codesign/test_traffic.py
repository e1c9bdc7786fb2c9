"""Collectives of a compiled program beside those that were written, on emulated devices."""

import dataclasses

import jax
import parity
import pytest

from dsv3_jax import lowering, mesh
from dsv3_jax.codesign import traffic
from dsv3_jax.codesign.hlo import Collective, Loop
from dsv3_jax.training.state import layout

SIZES = {'pipe': 1, 'data': 4, 'node': 2, 'local': 2}


def _found(**changes) -> Collective:
  default = Collective(
    'x',
    'all-gather',
    'all_gather',
    'jit(step)',
    100,
    400,
    4,
    False,
    False,
    {'data': 1.0},
    'main',
    (),
    False,
  )
  return dataclasses.replace(default, **changes)


def test_loops_multiply_and_those_of_unknown_length_run_only_outermost():
  layers, rounds = Loop('layers', 58), Loop('rounds', None)
  assert traffic.times((Loop('micro', None), layers), 4) == 4 * 58
  assert traffic.times((layers, rounds), 4) == 0
  assert traffic.times((rounds,), 0) == 0


def test_whatever_form_a_compiler_gives_it_a_gather_has_one_payload():
  gather = traffic.compiled(_found(), SIZES, 1)
  over_zeros = _found(kind='all-reduce', origin='', operand_bytes=400, fills=True)
  ring = _found(kind='collective-permute', origin='', members=2, operand_bytes=300)
  assert gather.payload == 400 and gather.sent == 300
  summed = traffic.compiled(over_zeros, SIZES, 1)
  assert (summed.kind, summed.payload, summed.sent) == ('gather', 400, 600)
  hop = traffic.compiled(ring, SIZES, 1)
  assert (hop.kind, hop.payload, hop.sent) == ('gather', pytest.approx(400), pytest.approx(300))


@pytest.mark.parametrize(
  ('scope', 'kind'),
  [
    ('jit(step)/transpose(jvp(zero_permutes))', 'zero'),
    ('jit(step)/zero_permutes', 'zero'),
    ('jit(step)', 'exchange'),
  ],
)
def test_a_permute_hands_on_its_operand_for_zero_in_its_scope_and_for_the_experts_elsewhere(
  scope, kind
):
  permute = _found(
    kind='collective-permute', origin='ppermute', scope=scope, members=2, operand_bytes=100
  )
  moved = traffic.compiled(permute, SIZES, 1)
  assert (moved.kind, moved.payload, moved.sent) == (kind, 100, 100)


@pytest.mark.parametrize(
  ('made', 'kind'), [({}, 'scatter'), ({'joins': True}, 'sum'), ({'fills': True}, 'gather')]
)
def test_an_all_reduce_without_a_name_is_known_by_what_it_is_of(made, kind):
  found = _found(kind='all-reduce', origin='', operand_bytes=400, **made)
  assert traffic.compiled(found, SIZES, 1).kind == kind


def test_what_a_train_step_is_written_to_gather_is_every_split_weight_of_a_layer_in_every_pass():
  """ZeRO-3 under 'block': forward once, once more in the backward, each scattered once; the rest once a step."""
  c = parity.small({
    'mesh.data': 4, 'mesh.zero': 3, 'model.remat': 'block', 'model.mtp_depth': 0,
    'model.num_dense_layers': 0, 'batch.size': 16, 'batch.start_size': 8, 'batch.micro_size': 8,
  })  # fmt: skip
  device_mesh = mesh.make_mesh(c.mesh)
  program = lowering.train(c, device_mesh)
  written = lowering.read(program, dict(device_mesh.shape))
  assert program.outermost == 2
  sums = {}
  for moved in written.moved:
    sums[moved.kind] = sums.get(moved.kind, 0) + moved.payload
  placed = mesh.place(layout(c).params, c.mesh)
  layers, rest = 0, 0
  for path, at in jax.tree_util.tree_leaves_with_path(
    placed, is_leaf=lambda x: isinstance(x, mesh.Placement)
  ):
    if at.zero_dim is None:
      continue
    x = layout(c).params
    for name in mesh.path_names(path):
      x = x[name]
    size = x.size * 4
    in_stack = mesh.path_names(path)[0] == 'moe_layers'
    layers, rest = layers + size * in_stack, rest + size * (not in_stack)
  assert sums['gather'] == program.outermost * 2 * layers + rest
  assert sums['scatter'] == program.outermost * layers + rest
