"""What is read out of compiled programs, against programs whose traffic is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.codesign import hlo

_SIZES = {'data': 2, 'node': 2, 'local': 2}
_ALL = tuple(_SIZES)
_HEADER = 'HloModule m, is_scheduled=true, num_partitions=8\n'


def _compiled(f, *shapes: tuple[int, ...]) -> list[hlo.Collective]:
  """Collectives of f, compiled for eight devices; each gets arrays of these shapes."""
  grid = mesh.make_mesh(config.Mesh(data=2, node=2, local=2))
  varying = P(mesh.AXES)
  step = jax.shard_map(f, mesh=grid, in_specs=varying, out_specs=varying)
  whole = [jax.ShapeDtypeStruct((8 * s[0], *s[1:]), jnp.float32) for s in shapes]
  text = jax.jit(step).lower(*whole).compile().as_text()
  return hlo.collectives(text, dict(grid.shape))


def _shift(x, axes):
  n = lax.axis_size(axes)
  return lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])


_CALLS = {  # what is called, the kind it becomes, bytes of its operand for 64 floats
  'ppermute': (_shift, 'collective-permute', 256),
  'psum': (lax.psum, 'all-reduce', 256),
  'all_gather': (lambda x, a: lax.all_gather(x, a, tiled=True), 'all-gather', 256),
  'psum_scatter': (lambda x, a: lax.psum_scatter(x, a, tiled=True), 'reduce-scatter', 256),
  'all_to_all': (lambda x, a: lax.all_to_all(x, a, 0, 0, tiled=True), 'all-to-all', 256),
}


@pytest.mark.parametrize(
  'axes', [*[(a,) for a in _ALL], ('node', 'local'), ('data', 'local'), _ALL]
)
@pytest.mark.parametrize('call', _CALLS)
def test_kind_bytes_and_axes_of_each_collective_over_each_group_of_axes(call, axes):
  f, kind, size = _CALLS[call]
  (found,) = _compiled(lambda x: f(x, axes), (64,))
  assert (found.kind, found.operand_bytes, found.axes) == (kind, size, axes)
  assert found.loops == () and not found.asynchronous


def test_a_permute_over_two_axes_counts_for_each_by_the_devices_that_cross_it():
  found = _compiled(lambda x: _shift(x, ('node', 'local')), (64,))
  # 0 -> 1 -> 2 -> 3 -> 0: all change `local`, every second one changes `node`.
  assert hlo.bytes_by_axis(found) == {'node': 128, 'local': 256}


def test_bytes_between_nodes_are_those_of_the_node_hop_alone():
  def hops(x, y):
    return _shift(_shift(x, 'node'), 'local'), _shift(y, 'local')

  assert hlo.bytes_by_axis(_compiled(hops, (64,), (16,))) == {'node': 256, 'local': 320}


def test_only_permutes_are_counted_by_axis():
  assert hlo.bytes_by_axis(_compiled(lambda x: lax.psum(x, 'node'), (64,))) == {}


def test_loops_are_named_from_the_outside_in_with_their_trip_counts():
  def loops(x):
    inner = lambda _, y: _shift(jnp.tanh(y), 'local')
    x = lax.fori_loop(0, 3, lambda _, y: lax.fori_loop(0, 7, inner, y) + 1, x)
    return lax.while_loop(lambda y: lax.psum(y.sum(), 'node') < 9, lambda y: 2 * y, x)

  permute, psum = sorted(_compiled(loops, (64,)), key=lambda c: len(c.loops), reverse=True)
  assert [loop.trips for loop in permute.loops] == [3, 7]
  assert psum.kind == 'all-reduce' and [loop.trips for loop in psum.loops] == [None]


def test_a_program_on_one_device_sends_nothing():
  text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
  assert hlo.collectives(text, dict.fromkeys(_ALL, 1)) == []


def test_a_mesh_of_another_size_than_the_program_is_refused():
  with pytest.raises(ValueError, match='data 2 x node 4 = 8 devices: the program is one for 1'):
    hlo.collectives('HloModule m, is_scheduled=true\n', {'data': 2, 'node': 4})


# ---- forms of text ---------------------------------------------------------------------------------


def _line(groups: str) -> str:
  body = (
    f'  ROOT %r = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add'
  )
  return f'{_HEADER}\nENTRY %main (x: f32[64]) -> f32[64] {{\n  %x = f32[64]{{0}} parameter(0)\n{body}\n}}\n'


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{}', _ALL),
    ('{{0,1},{2,3},{4,5},{6,7}}', ('local',)),
    ('{{0,1,4,5},{2,3,6,7}}', ('data', 'local')),
    ('[1,8]<=[8]', _ALL),
    ('[4,2]<=[8]', ('local',)),
    ('[4,2]<=[2,4]T(1,0)', ('data',)),
    ('[4,2]<=[2,2,2]T(0,2,1)', ('node',)),
    ('[2,4]<=[2,2,2]T(1,0,2)', ('data', 'local')),
    ("mesh['data'=2,'node'=2,'local'=2] {'node'}", ('node',)),
    ("mesh['data'=2,'node'=2,'local'=2] {'data','local'}", ('data', 'local')),
    ("mesh['x'=4,'y'=2] {'x'}", ('data', 'node')),
  ],
)
def test_replica_groups_in_every_form_give_the_axes(groups, axes):
  (found,) = hlo.collectives(_line(groups), _SIZES)
  assert found.axes == axes


@pytest.mark.parametrize('groups', ["mesh['x'=8] {'x':(1)2}", '@elsewhere'])
def test_replica_groups_in_an_unknown_form_are_refused(groups):
  with pytest.raises(ValueError, match='replica groups in a form unknown here'):
    hlo.collectives(_line(groups), _SIZES)


@pytest.mark.parametrize(
  ('made', 'fills', 'joins'),
  [
    ('fusion(%x, %y), kind=kLoop, calls=%joined', False, True),
    ('fusion(%x, %y), kind=kLoop, calls=%added', False, False),
    ('dynamic-update-slice(%z, %x, %i)', True, False),
  ],
)
def test_the_buffer_of_a_sum_tells_what_it_was(made, fills, joins):
  inside = '  %a = f32[4]{0} parameter(0)\n  %b = f32[4]{0} parameter(1)\n'
  bodies = {'joined': 'f32[8]{0} concatenate(%a, %b), dimensions={0}'}
  bodies['added'] = 'f32[8]{0} add(%a, %b)'
  called = ''.join(
    f'%{name} (a: f32[4], b: f32[4]) -> f32[8] {{\n{inside}  ROOT %c = {body}\n}}\n\n'
    for name, body in bodies.items()
  )
  text = f"""{_HEADER}
{called}ENTRY %main (x: f32[4], y: f32[4], z: f32[8], i: s32[]) -> f32[8] {{
  %x = f32[4]{{0}} parameter(0)
  %y = f32[4]{{0}} parameter(1)
  %z = f32[8]{{0}} parameter(2)
  %i = s32[] parameter(3)
  %m = f32[8]{{0}} {made}
  ROOT %r = f32[8]{{0}} all-reduce(%m), replica_groups={{}}, to_apply=%add
}}
"""
  (found,) = hlo.collectives(text, _SIZES)
  assert (found.fills, found.joins) == (fills, joins)


def test_the_start_of_a_gather_or_permute_has_its_operand_in_its_shape_and_not_in_its_result():
  text = f"""{_HEADER}
ENTRY %main (x: f32[8]) -> f32[64] {{
  %x = f32[8]{{0}} parameter(0)
  %g = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={{0}}
  %a = f32[64]{{0}} all-gather-done(%g)
  %p = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}}}}
  %b = f32[8]{{0}} collective-permute-done(%p)
}}
"""
  found = hlo.collectives(text, _SIZES)
  assert [(each.operand_bytes, each.result_bytes) for each in found] == [(32, 256), (32, 32)]


@pytest.mark.parametrize(
  ('shape', 'size'),
  [
    ('f32[]', 4),
    ('bf16[8,128]{1,0:T(8,128)(2,1)S(1)}', 2048),
    ('f8e4m3fn[7]{0}', 7),
    ('pred[3]{0}', 3),
    ('s4[9]{0:E(4)}', 5),
    ('(f32[2]{0}, (u8[3]{0}, c64[2]{0}), token[])', 27),
  ],
)
def test_bytes_of_a_shape(shape, size):
  assert hlo.shape_bytes(shape) == size


# ---- overlap ---------------------------------------------------------------------------------------

_COMPUTATIONS = """
%plus (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} add(%a, %a)
}

%gemm_inside (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %b = f32[8,8]{1,0} %DOT%(%a, %a)
}

%block (c: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %m = f32[8,8]{1,0} get-tuple-element(%c), index=1
  %n = f32[8,8]{1,0} fusion(%m), kind=kCustom, calls=%gemm_inside
  ROOT %r = (s32[], /*index=1*/f32[8,8]{1,0}) tuple(%i, %n)
}

%more (c: (s32[], f32[8,8])) -> pred[] {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %p = pred[] constant(false)
}
"""


def _scheduled(*lines: str, dot: str = 'dot') -> str:
  args = ('%x = f32[8]{0} parameter(0)', '%m = f32[8,8]{1,0} parameter(1)')
  body = '\n'.join(f'  {line}' for line in (*args, *lines))
  computations = _COMPUTATIONS.replace('%DOT%', dot)
  return f'{_HEADER}{computations}\nENTRY %main (x: f32[8], m: f32[8,8]) -> f32[8] {{\n{body}\n}}\n'


_WRAPPED = """
%wrapped (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""
_START = (
  '%s = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}'
)
_DONE = 'ROOT %d = f32[8]{0} collective-permute-done(%s)'
_FUSION = '%f = f32[8]{0} fusion(%x), kind=kLoop, calls=%plus'
_GEMM = '%g = f32[8,8]{1,0} fusion(%m), kind=kOutput, calls=%gemm_inside'
_WHILE = '%w = (s32[], f32[8,8]{1,0}) while(%t), condition=%more, body=%block'


def _between(*lines: str, dot: str = 'dot', start: str = _START, done: str = _DONE) -> hlo.Overlap:
  found = hlo.overlaps(_scheduled(start, *lines, done, dot=dot))
  return next(each for each in found if each.name == 's')


@pytest.mark.parametrize('dot', ['dot', 'convolution', 'ragged-dot'])
def test_a_fusion_is_a_matmul_when_its_computation_holds_one(dot):
  assert _between(_FUSION, _GEMM, dot=dot).matmuls == 1
  assert _between(_FUSION, _GEMM, dot='multiply').matmuls == 0


def test_a_loop_over_blocks_of_matmuls_is_a_matmul():
  assert _between(_WHILE).matmuls == 1
  assert _between(_WHILE, dot='multiply').others == 1


def test_a_branch_counts_by_what_any_of_its_computations_holds():
  branch = '%c = f32[8]{0} conditional(%p, %x, %m), branch_computations={%plus, %gemm_inside}'
  assert _between(branch).matmuls == 1


@pytest.mark.parametrize('target', ['__cublas$gemm', '__cublas$lt$matmul$f8', '__onednn$matmul'])
def test_a_library_call_is_a_matmul_by_its_target(target):
  call = f'%g = f32[8,8]{{1,0}} custom-call(%m, %m), custom_call_target="{target}"'
  assert _between(call).matmuls == 1


def test_a_kernel_is_a_matmul_by_its_name():
  call = (
    '%k = f32[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="NAME"}'
  )
  for name in ('grouped_gemm/pallas_call', 'ragged_dot_general/ragged-dot-none'):
    assert _between(call.replace('NAME', f'jit(f)/{name}')).matmuls == 1
  quantise = _between(call.replace('NAME', 'jit(f)/quantise/pallas_call'))
  assert (quantise.matmuls, quantise.others) == (0, 1)


def test_only_what_stands_strictly_between_start_and_done_counts():
  text = _scheduled(_GEMM, _START, _FUSION, '%d = f32[8]{0} collective-permute-done(%s)', _WHILE)
  (found,) = hlo.overlaps(text)
  assert (found.matmuls, found.others, found.collectives) == (0, 1, 0)


def test_collectives_in_flight_at_once_are_counted_for_each():
  second = _START.replace('%s =', '%s2 =')
  text = _scheduled(_START, second, _GEMM, '%e = f32[8]{0} collective-permute-done(%s2)', _DONE)
  first, second = hlo.overlaps(text)
  assert (first.matmuls, first.collectives) == (second.matmuls, second.collectives + 1) == (1, 1)


def test_a_pair_that_the_gpu_runs_as_one_hides_nothing():
  config_ = ', backend_config={"collective_backend_config":{"is_sync":true,"is_pipelined":false}}'
  found = _between(_GEMM, start=_START + config_)
  assert not found.asynchronous and found.matmuls == 0


def test_a_synchronous_permute_hides_nothing():
  plain = 'ROOT %s = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}'
  (found,) = hlo.overlaps(_scheduled(_GEMM, plain))
  assert not found.asynchronous and found.matmuls == 0


def test_a_generic_asynchronous_call_is_the_collective_it_wraps_once():
  start = '%s = ((f32[8]{0}), f32[8]{0}) async-start(%x), calls=%wrapped'
  text = _scheduled(start, _GEMM, 'ROOT %d = f32[8]{0} async-done(%s)')
  text = text.replace(_HEADER, _HEADER + _WRAPPED)
  (found,) = hlo.overlaps(text)
  assert (found.kind, found.asynchronous, found.matmuls) == ('collective-permute', True, 1)
  (sent,) = hlo.collectives(text, _SIZES)
  assert sent.operand_bytes == 32 and dict(sent.share) == {'local': 0.25}


def test_a_transfer_between_slices_crosses_the_outer_axis_and_ids_count_within_a_slice():
  attributes = 'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}"}'
  send = f'%s = (f32[8]{{0}}, u32[], token[]) send(%x, %t), channel_id=1, {attributes}'
  text = _scheduled(
    '%t = token[] after-all()',
    send,
    _GEMM,
    '%e = token[] send-done(%s)',
    _START.replace('%s', '%p'),
    _DONE.replace('%s', '%p'),
  ).replace('num_partitions=8', 'num_partitions=4')
  sent, permute = hlo.collectives(text, _SIZES)
  assert (sent.kind, sent.axes, sent.operand_bytes) == ('send', ('data',), 32)
  assert dict(permute.share) == {'local': 0.5}
  assert [each.matmuls for each in hlo.overlaps(text)] == [1, 0]


def test_a_collective_fused_with_compute_on_a_tpu_is_found_once():
  part = lambda name, flag: (
    f'%{name} (a: f32[8]) -> f32[16] {{\n  %a = f32[8]{{0}} parameter(0)\n'
    '  ROOT %g = f32[16]{0} all-gather(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, '
    'frontend_attributes={chain_id="0"}, '
    f'backend_config={{"async_collective_fusion_config":{{"flag_start":"{flag}"}}}}\n}}\n'
  )
  names = {'first': -1, 'step': 2, 'last': 2}
  lines = (
    '%async-collective-start = (f32[8]{0}, f32[16]{0}) fusion(%x), kind=kCustom, calls=%first',
    _GEMM,
    '%fusion.1 = (f32[8]{0}, f32[16]{0}) fusion(%x), kind=kCustom, calls=%step',
    'ROOT %async-collective-done = f32[16]{0} fusion(%x), kind=kCustom, calls=%last',
  )
  text = _scheduled(*lines)
  text = text.replace(_HEADER, _HEADER + '\n'.join(part(*item) for item in names.items()))
  (found,) = hlo.collectives(text, _SIZES)
  assert (found.kind, found.axes, found.operand_bytes) == ('all-gather', ('local',), 32)
  (overlap,) = hlo.overlaps(text)
  assert (overlap.asynchronous, overlap.matmuls, overlap.others) == (True, 1, 1)


def test_a_ragged_exchange_counts_its_rows_and_not_its_offsets():
  line = (
    '%r = f32[8,8]{1,0} ragged-all-to-all(%m, %m, %x, %x, %x, /*index=5*/%x), replica_groups={}'
  )
  (found,) = hlo.collectives(_scheduled(line), _SIZES)
  assert (found.kind, found.operand_bytes) == ('ragged-all-to-all', 256)


def test_a_program_without_a_schedule_is_refused():
  with pytest.raises(ValueError, match='not scheduled'):
    hlo.overlaps(_scheduled(_START, _DONE).replace('is_scheduled=true, ', ''))


def test_a_start_that_is_never_done_is_refused():
  with pytest.raises(ValueError, match='s in main is started there and never done'):
    hlo.overlaps(_scheduled(_START, _GEMM))


def test_the_cpu_overlaps_nothing_whatever_stands_beside():
  grid = mesh.make_mesh(config.Mesh(local=8))
  f = lambda x, w: (_shift(x, 'local'), w @ w)
  step = jax.shard_map(f, mesh=grid, in_specs=P('local'), out_specs=P('local'))
  x, w = np.ones((64, 4), np.float32), np.ones((64, 8), np.float32)
  (found,) = hlo.overlaps(jax.jit(step).lower(x, w).compile().as_text())
  assert (found.kind, found.asynchronous, found.matmuls) == ('collective-permute', False, 0)
