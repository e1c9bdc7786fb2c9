"""Gathers by permutes against the backend's own, forward and backward; what they send, compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, lowering, mesh
from dsv3_jax.codesign import hlo, traffic
from dsv3_jax.mesh import TOKENS
from dsv3_jax.parallel import zero


@pytest.mark.parametrize('sizes', [(4, 2, 2), (2, 1, 4), (1, 8, 1), (16, 1, 1)], ids=str)
@pytest.mark.parametrize(('part', 'columns'), [(3, 5), (4, 512)], ids=str)
def test_permutes_gather_and_scatter_what_collectives_do(sizes, part, columns):
  """Rows that are less than a tile, and such that fill some together."""
  device_mesh = mesh.make_mesh(config.Mesh(1, *sizes))
  ways = int(np.prod(sizes))
  rng = np.random.default_rng(0)
  shape = part * ways, columns
  x = rng.integers(-50, 50, shape).astype(np.float32)
  dy = rng.integers(-50, 50, (ways, *shape)).astype(np.float32)  # sums are exact
  spec = P(TOKENS)

  @functools.partial(jax.jit, static_argnums=0)
  def run(permutes, x, dy):
    placement = mesh.Placement(2, None, 0, TOKENS)

    def on_device(x, dy):
      gather = lambda x: zero.gather(
        {'w_AB': x}, {('w_AB',): placement}, x.dtype, permutes=permutes
      )['w_AB']
      y, back = jax.vjp(gather, x)
      return y[None], back(dy[0])[0]

    in_specs, out_specs = (spec, P(TOKENS)), (P(TOKENS), spec)
    mapped = jax.shard_map(on_device, mesh=device_mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(x, dy)

  y, dx = run(1, x, dy)
  np.testing.assert_array_equal(y, np.broadcast_to(x, y.shape))
  np.testing.assert_array_equal(dx, dy.sum(0))
  for ours, theirs in zip((y, dx), run(0, x, dy), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_a_step_by_permutes_sends_the_bytes_of_its_gathers_and_scatters():
  """Of scanned layers: where none is, XLA:CPU merges the permutes of a forward with those of its recomputation."""
  sizes = {'mesh.data': 4, 'mesh.node': 2, 'mesh.local': 2, 'mesh.zero': 3, 'model.remat': 'block'}
  sizes |= {'model.num_dense_layers': 0, 'model.mtp_depth': 0}
  sizes |= {'batch.size': 32, 'batch.start_size': 16, 'batch.micro_size': 16}
  moved = {}
  for permutes in (0, 1):
    c = parity.small(sizes | {'mesh.zero_permutes': permutes})
    device_mesh = mesh.make_mesh(c.mesh)
    program = lowering.train(c, device_mesh)
    shape = dict(device_mesh.shape)
    moved[permutes] = lowering.read(program, shape).moved
  sent = lambda permutes, kinds: sum(m.sent for m in moved[permutes] if m.kind in kinds)
  rest = sent(1, ('gather', 'scatter'))  # what is split along columns
  whole = sent(0, ('gather', 'scatter'))
  assert 0 < rest < whole / 2
  assert sent(1, ('zero',)) == pytest.approx(whole - rest)
  found = hlo.collectives(program.traced.lower().compile().as_text(), shape)
  zeros = [traffic.compiled(each, shape, program.outermost) for each in found]
  compiled = sum(m.payload for m in zeros if m.kind == 'zero')
  assert compiled == pytest.approx(sent(1, ('zero',)))


def _side_by_side(permutes: int):
  """Weights as a layer has them -> what arrives, its gradients, and the compiled program."""
  device_mesh = mesh.make_mesh(config.Mesh(data=4, node=2))
  axes = 'data', 'node'
  rng = np.random.default_rng(0)
  shapes = {
    'a_DX': (16, 6),
    'b_DX': (16, 6),
    'c_DX': (16, 5),
    'd_DXX': (16, 3, 4),
    'e_XD': (4, 16),
    'f_XD': (24, 2),
  }
  columns = 'e_XD'
  of = {n: mesh.Placement(len(s), None, int(n == columns), axes) for n, s in shapes.items()}
  of = {(n,): at for n, at in of.items()}
  draw = lambda *shape: rng.integers(-50, 50, shape).astype(np.float32)  # sums are exact
  tree = {n: draw(*s) for n, s in shapes.items()}
  dy = {n: draw(8, *s) for n, s in shapes.items()}
  split = {n: P(None, axes) if n == columns else P(axes) for n in shapes}

  def on_device(tree, dy):
    y, back = jax.vjp(lambda t: zero.gather(t, of, jnp.float32, permutes=permutes), tree)
    return jax.tree.map(lambda x: x[None], y), back(jax.tree.map(lambda x: x[0], dy))[0]

  every = {n: P(axes) for n in shapes}
  mapped = jax.shard_map(
    on_device, mesh=device_mesh, in_specs=(split, every), out_specs=(every, split)
  )
  program = jax.jit(mapped).lower(tree, dy).compile()
  return tree, dy, program(tree, dy), program.as_text()


def test_small_weights_whose_parts_have_as_many_rows_go_side_by_side():
  tree, dy, (y, dx), text = _side_by_side(1)
  for name, x in tree.items():
    np.testing.assert_array_equal(y[name], np.broadcast_to(x, y[name].shape), err_msg=name)
    np.testing.assert_array_equal(dx[name], dy[name].sum(0), err_msg=name)
  found = hlo.collectives(text, {'pipe': 1, 'data': 4, 'node': 2, 'local': 1})
  kinds = [each.kind for each in found]
  # a, b and c; d, of other rows; f, of other rows: log2 8 permutes there, and back. e goes along its columns.
  assert kinds.count('collective-permute') == 3 * 3 * 2
  assert kinds.count('all-gather') == kinds.count('reduce-scatter') == 1


def test_what_is_below_the_threshold_stays_with_collectives():
  found = hlo.collectives(_side_by_side(72)[-1], {'pipe': 1, 'data': 4, 'node': 2, 'local': 1})
  kinds = [each.kind for each in found]
  assert kinds.count('collective-permute') == 2 * 3 * 2  # a with b and c; d
  assert kinds.count('all-gather') == 2  # e, f


def test_an_embedding_is_sent_in_the_compute_dtype_and_handed_on_in_float32():
  device_mesh = mesh.make_mesh(config.Mesh(data=8))
  x = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
  placements = {('embed_VD',): mesh.Placement(2, None, 0, TOKENS)}
  run = lambda x: zero.gather({'embed_VD': x}, placements, jnp.bfloat16)['embed_VD'][None]
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=P(TOKENS), out_specs=P(TOKENS))
  whole = jax.jit(mapped)(x)
  assert whole.dtype == jnp.float32
  np.testing.assert_array_equal(whole, np.broadcast_to(x.astype(jnp.bfloat16), (8, 16, 128)))
  (sent,) = re.findall(r'all_gather.* -> tensor<(.*)>', jax.jit(mapped).lower(x).as_text())
  assert sent == '16x128xbf16'


def test_gradients_of_what_is_gathered_once_a_step_are_scattered_by_permutes_too():
  device_mesh = mesh.make_mesh(config.Mesh(data=2, node=2, local=4))
  dy = np.random.default_rng(0).integers(-50, 50, (16, 12, 8)).astype(np.float32)  # sums are exact
  axes = 'data', 'node'
  placements = {('w_AB',): mesh.Placement(2, None, 0, axes)}
  run = lambda dy: zero.reduce({'w_AB': dy[0]}, placements, permutes=1)['w_AB']
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=P(TOKENS), out_specs=P(axes))
  program = jax.jit(mapped).lower(dy).compile()
  np.testing.assert_array_equal(program(dy), dy.sum(0))
  found = hlo.collectives(program.as_text(), dict(device_mesh.shape))
  whole = dy[0].nbytes
  # The node's half first, of the data axis then half of that; what is left is summed over local.
  sizes = sorted((each.kind, each.axes, each.operand_bytes) for each in found)
  assert sizes == [
    ('all-reduce', ('local',), whole // 4),
    ('collective-permute', ('data',), whole // 4),
    ('collective-permute', ('node',), whole // 2),
  ]


def test_a_gather_by_permutes_sums_in_a_tree():
  """16 equal parts of a gradient in BF16, whose sums of 2, 4, 8 and 16 are exact; one after another they are not."""
  device_mesh = mesh.make_mesh(config.Mesh(data=16))
  dy = np.full((16, 16), 33.0, np.float32).astype(jnp.bfloat16)
  in_turn = functools.reduce(lambda total, x: total + x, list(dy[:, 0]))
  assert float(in_turn) != 16 * 33

  def on_device(dy):
    gather = lambda x: zero._double(x, ('data',), 0)
    _, back = jax.vjp(gather, lax.dynamic_slice_in_dim(dy[0], 0, 1))
    return back(dy[0])[0]

  mapped = jax.shard_map(on_device, mesh=device_mesh, in_specs=P(TOKENS), out_specs=P(TOKENS))
  np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(dy), np.float32), 16 * 33)


def test_a_gradient_is_scattered_before_its_part_is_summed_over_further_copies():
  """An embedding that only data x node can share: its copies over local add up parts, not all of it."""
  device_mesh = mesh.make_mesh(config.Mesh(data=2, node=2, local=4))
  dy = np.random.default_rng(0).integers(-50, 50, (16, 12, 5)).astype(np.float32)  # sums are exact
  placements = {('w_AB',): mesh.Placement(2, None, 0, ('data', 'node'))}
  run = lambda dy: zero.reduce({'w_AB': dy[0]}, placements)['w_AB']
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=P(TOKENS), out_specs=P(('data', 'node')))
  program = jax.jit(mapped).lower(dy).compile()
  np.testing.assert_array_equal(program(dy), dy.sum(0))
  found = hlo.collectives(program.as_text(), dict(device_mesh.shape))
  whole = dy[0].nbytes
  sizes = {each.axes: each.operand_bytes for each in found}
  assert sizes == {('data', 'node'): whole, ('local',): whole // 4}


def test_no_weight_is_split_into_single_columns_where_fewer_devices_leave_rows():
  """V3's shared experts on 2,048 devices: [7168, 2048] in 2,048 columns would fill 128 times its memory."""
  sizes = config.Mesh(1, 32, 8, 8, 3)
  shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in {
    'gate_DF': (7168, 2048), 'down_FD': (18432, 7168), 'small_AB': (64, 2048),
  }.items()}  # fmt: skip
  placed = mesh.place(shapes, sizes)
  assert (placed['gate_DF'].zero_dim, placed['gate_DF'].zero_axes) == (0, ('data', 'node'))
  assert (placed['down_FD'].zero_dim, placed['down_FD'].zero_axes) == (0, TOKENS)
  assert (placed['small_AB'].zero_dim, placed['small_AB'].zero_axes) == (1, TOKENS)
