"""Our layout on disk: what was written comes back anywhere, and what was not is never taken for it."""

import itertools
import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import config, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.training import state
from dsv3_jax.weights import store

_GATE = ('params', 'moe_layers', 'ffn', 'gate_EDF')
_HEAD = ('params', 'head_DV')


def _config(**changes) -> config.Config:
  d = config.debug(config.default())
  d.update_from_flattened_dict(changes)
  return config.freeze(d)


def _abstract(c: config.Config) -> state.State:
  abstract = state.abstract(c, mesh.make_mesh(c.mesh))
  return {key: abstract[key] for key in ('params', 'router_bias')}


def _leaves(dtype='bfloat16') -> list[store.Leaf]:
  tree = _abstract(_config())
  return [
    *store.leaves({'params': tree['params']}, dtype),
    *store.leaves({'router_bias': tree['router_bias']}),
  ]


def _chunks(leaves: list[store.Leaf]):
  """(leaf, index, values) of every chunk; no two alike."""
  for leaf in leaves:
    for at in leaf.chunks():
      rng = np.random.default_rng([len(leaf.name), *leaf.name.encode(), *at])
      yield leaf, at, rng.standard_normal(leaf.shape[leaf.lead :], np.float32).astype(leaf.dtype)


def _write(folder: pathlib.Path, most: int | None = None, source: str = 'here') -> store.Writer:
  writer = store.create(folder, _leaves(), source)
  for leaf, at, values in itertools.islice(_chunks(_leaves()), most):
    if not writer.done(leaf.path, at):
      writer.write(leaf.path, at, values)
  return writer


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('store') / 'weights'
  _write(folder).finish()
  return folder


@pytest.fixture
def damaged(whole, tmp_path) -> pathlib.Path:
  return shutil.copytree(whole, tmp_path / 'weights')


def _chunk_file(folder: pathlib.Path, path: store.Path, *at: int) -> pathlib.Path:
  return folder / '.'.join(path) / '.'.join(['c', *map(str, at)])


# ---- there and back ------------------------------------------------------------------------------


def test_a_chunk_is_one_matrix_of_one_layer_and_one_expert():
  shapes = {leaf.name: (leaf.lead, leaf.chunk) for leaf in _leaves()}
  assert shapes['params.moe_layers.ffn.gate_EDF'] == (2, (1, 1, 32, 16))
  assert shapes['params.moe_layers.ffn.shared.gate_DF'] == (1, (1, 32, 16))
  assert shapes['params.moe_layers.ffn.router_DE'] == (1, (1, 32, 8))
  assert shapes['params.mtp.block.ffn.down_EFD'] == (2, (1, 1, 16, 32))
  assert shapes['params.moe_layers.attn.q_up_QNJ'] == (1, (1, 16, 2, 12))
  assert shapes['params.head_DV'] == (0, (32, 512))
  assert shapes['router_bias.moe_layers.ffn.bias_E'] == (1, (1, 8))


def test_every_chunk_comes_back_bit_by_bit_and_lies_in_a_file_of_its_own(whole):
  found = store.open(whole)
  for leaf, at, values in _chunks(_leaves()):
    read = found.read(leaf.path, at)
    assert read.dtype == leaf.dtype and read.tobytes() == values.tobytes()
    size = _chunk_file(whole, leaf.path, *at, *[0] * values.ndim).stat().st_size
    assert size == values.nbytes + 4  # its CRC-32C


@pytest.mark.parametrize(
  'sizes', [{}, {'mesh.data': 2, 'mesh.node': 2, 'mesh.local': 2, 'mesh.zero': 3}]
)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_load_gives_the_same_values_on_any_mesh_in_the_dtype_asked_for(whole, sizes, dtype):
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), _abstract(_config(**sizes))
  )
  loaded = store.open(whole).load(wanted)
  by_path = {mesh.path_names(p): x for p, x in jax.tree_util.tree_leaves_with_path(loaded)}
  shapes = {mesh.path_names(p): x for p, x in jax.tree_util.tree_leaves_with_path(wanted)}
  for leaf, at, values in _chunks(_leaves()):
    x = by_path[leaf.path]
    assert x.dtype == dtype and x.sharding == shapes[leaf.path].sharding
    np.testing.assert_array_equal(np.asarray(x)[at], values.astype(dtype))


def test_each_device_reads_only_the_matrices_that_it_holds(whole):
  found, asked = store.open(whole), []

  def read(path, index):
    asked.append((path, index))
    return found.read(path, index)

  wanted = _abstract(_config(**{'mesh.local': 8}))['params']['moe_layers']['ffn']['gate_EDF']
  loaded = found.load({'params': {'moe_layers': {'ffn': {'gate_EDF': wanted}}}}, read)
  assert sorted(index[:2] for _, index in asked) == list(itertools.product(range(2), range(8)))
  assert jax.tree.leaves(loaded)[0].addressable_shards[3].data.shape == (2, 1, 32, 16)


def test_zeros_are_written_like_any_other_numbers(tmp_path):
  leaf = store.Leaf(('params', 'head_DV'), np.dtype(np.float32), (3, 4))
  writer = store.create(tmp_path / 'w', [leaf], '')
  assert not writer.done(leaf.path, ())
  writer.write(leaf.path, (), np.zeros((3, 4), np.float32))
  writer.finish()
  np.testing.assert_array_equal(store.open(tmp_path / 'w').read(leaf.path), np.zeros((3, 4)))


def test_codes_of_fp8_pass_as_they_are(tmp_path):
  codes = np.arange(256, dtype=np.uint8).reshape(16, 16).view(ml_dtypes.float8_e4m3fn)
  leaf = store.Leaf(('params', 'head_DV'), codes.dtype, (16, 16))
  writer = store.create(tmp_path / 'w', [leaf], '')
  writer.write(leaf.path, (), codes.T)  # not in row order
  writer.finish()
  found = store.open(tmp_path / 'w')
  assert found.fp8 and found.read(leaf.path).tobytes() == codes.T.tobytes()


# ---- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize('most', [0, 1, 40])
def test_an_unfinished_folder_is_no_weights_and_goes_on_to_the_same_files(whole, tmp_path, most):
  writer = _write(tmp_path / 'weights', most)
  writer.close()  # without `finish`
  with pytest.raises(ConfigError, match=r'weights: holds a conversion that was not finished$'):
    store.open(tmp_path / 'weights')
  writer = store.create(tmp_path / 'weights', _leaves(), 'here')
  done = [writer.done(leaf.path, at) for leaf, at, _ in _chunks(_leaves())]
  assert done == [i < most for i in range(len(done))]
  for (leaf, at, values), is_done in zip(_chunks(_leaves()), done, strict=True):
    if not is_done:
      writer.write(leaf.path, at, values)
  writer.finish()
  names = lambda folder: {str(p.relative_to(folder)): p for p in folder.rglob('*') if p.is_file()}
  one, two = names(whole), names(tmp_path / 'weights')
  assert one.keys() == two.keys()
  assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)


def test_a_chunk_that_lost_its_end_is_not_done(tmp_path):
  writer = _write(tmp_path / 'weights')
  writer.close()
  file = _chunk_file(tmp_path / 'weights', _GATE, 1, 3, 0, 0)
  file.write_bytes(file.read_bytes()[:-1])
  assert not writer.done(_GATE, (1, 3)) and writer.done(_GATE, (1, 2))


def test_finish_refuses_a_folder_with_a_chunk_missing(tmp_path):
  writer = _write(tmp_path / 'weights', 5)
  with pytest.raises(ValueError, match='was never written'):
    writer.finish()
  assert not store.is_whole(tmp_path / 'weights')


def test_weights_of_another_source_are_not_mixed_in(whole, tmp_path):
  _write(tmp_path / 'weights', 3).close()
  with pytest.raises(
    ConfigError, match='holds an unfinished conversion of another source or dtype'
  ):
    store.create(tmp_path / 'weights', _leaves(), 'elsewhere')
  with pytest.raises(
    ConfigError, match='holds an unfinished conversion of another source or dtype'
  ):
    store.create(tmp_path / 'weights', _leaves('float32'), 'here')
  with pytest.raises(ConfigError, match='holds weights of another source or dtype'):
    store.create(whole, _leaves(), 'elsewhere')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('mine')
  with pytest.raises(ConfigError, match='holds other files'):
    store.create(tmp_path / 'other', _leaves(), 'here')
  assert [p.name for p in (tmp_path / 'other').iterdir()] == ['notes.txt']


def test_two_writers_cannot_share_a_folder(tmp_path):
  writer = store.create(tmp_path / 'weights', _leaves(), 'here')
  with pytest.raises(ConfigError, match='another process is writing to it'):
    store.create(tmp_path / 'weights', _leaves(), 'here')
  writer.close()
  store.create(tmp_path / 'weights', _leaves(), 'here').close()


def test_arrays_that_do_not_fit_are_refused(tmp_path):
  writer = store.create(tmp_path / 'weights', _leaves(), 'here')
  with pytest.raises(ValueError, match='wants bfloat16, not float32'):
    writer.write(_HEAD, (), np.zeros((32, 512), np.float32))
  with pytest.raises(ValueError, match=re.escape('wants shape (32, 512)')):
    writer.write(_HEAD, (), np.zeros((512, 32), ml_dtypes.bfloat16))


# ---- damage --------------------------------------------------------------------------------------


def _told(folder: pathlib.Path) -> str:
  with pytest.raises(ConfigError) as error:
    store.open(folder).load({'params': {'head_DV': _abstract(_config())['params']['head_DV']}})
  assert '\n' not in str(error.value) and str(folder) in str(error.value)
  return str(error.value)


@pytest.mark.parametrize('byte', [0, 777, -1])
def test_a_flipped_bit_is_found(damaged, byte):
  file = _chunk_file(damaged, _HEAD, 0, 0)
  content = bytearray(file.read_bytes())
  content[byte] ^= 1
  file.write_bytes(content)
  assert 'Digest mismatch' in _told(damaged)


def test_a_chunk_that_is_gone_or_cut_is_found_and_not_read_as_zeros(damaged):
  file = _chunk_file(damaged, _HEAD, 0, 0)
  assert store.open(damaged).missing() == []
  file.write_bytes(file.read_bytes()[:-9])
  assert 'cannot be read' in _told(damaged)
  file.unlink()
  assert 'is missing' in _told(damaged)
  assert store.open(damaged).missing() == ['params.head_DV[]']


def test_metadata_that_says_something_else_is_found(damaged):
  path = damaged / 'params.head_DV' / 'zarr.json'
  path.write_text(path.read_text().replace('512', '256'))
  assert 'cannot be read' in _told(damaged)


def test_a_damaged_manifest_is_found(damaged):
  manifest = damaged / store.MANIFEST
  values = json.loads(manifest.read_text())
  values['body']['leaves']['params.head_DV'][0] = 'float32'
  for text in (json.dumps(values), '{', '[]', ''):
    manifest.write_text(text)
    with pytest.raises(ConfigError, match=r'manifest\.json: is damaged; '):
      store.open(damaged)


def test_a_tree_of_another_model_is_told_leaf_by_leaf(whole):
  wanted = _abstract(_config(**{'model.vocab_size': 300}))
  with pytest.raises(ConfigError) as error:
    store.open(whole).load(wanted)
  assert str(error.value).splitlines() == [
    f'{whole}: params.embed_VD: [512, 32] stored, [300, 32] wanted',
    f'{whole}: params.head_DV: [32, 512] stored, [32, 300] wanted',
  ]
  with pytest.raises(ConfigError, match=r'params\.other_D: nothing stored, \[3\] wanted$'):
    store.open(whole).load({'params': {'other_D': jax.ShapeDtypeStruct((3,), np.float32)}})
