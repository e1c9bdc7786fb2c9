"""The other programs on imported weights: generate, evaluate, and training that starts from them."""

import itertools
import json
import shutil
import signal

import jax
import ml_dtypes
import numpy as np
import pytest
import released
import shell

from dsv3_jax import config, evaluate, flags, generate, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.training import state, workdir
from dsv3_jax.weights import store

BF16 = ml_dtypes.bfloat16


def _leaf(model: object, path: store.Path) -> np.ndarray:
  """The leaf of a module; router biases lie among its other weights."""
  for name in path[1:]:
    model = getattr(model, name)
  return np.asarray(model[...])


# ---- generate and evaluate -----------------------------------------------------------------------


def test_an_import_is_what_generate_and_evaluate_work_on(v3, capsys, tmp_path):
  folder = shutil.copytree(v3[1], tmp_path / 'work')
  assert generate.main([str(folder), '--prompt=def ', '--max_tokens=4', '--temperature=0']) == 0
  assert capsys.readouterr().err.startswith('imported weights, prefill ')
  values = json.loads((folder / workdir.CONFIG).read_text())
  (tmp_path / 'corpus').mkdir()
  for i in range(8):
    (tmp_path / 'corpus' / f'{i}.txt').write_text('return value\n' * 20)
  values['data'] |= {'corpus': str(tmp_path / 'corpus'), 'cache_dir': str(tmp_path), 'heldout': 0.5}
  (folder / workdir.CONFIG).write_text(json.dumps(values))
  assert evaluate.main([str(folder), '--bytes=100']) == 0
  assert capsys.readouterr().out.startswith('imported weights: held-out text, ')


def test_an_import_is_loaded_in_the_dtypes_that_it_is_computed_in(v3):
  loaded = workdir.load(v3[1])
  assert (loaded.step, loaded.name) == (None, 'imported weights')
  assert state.layout(loaded.config).params == state.layout(_run_config()).params
  for (path, index), values in v3[2].items():
    leaf = _leaf(loaded.model, path)
    is_matrix = len(path[-1].rpartition('_')[2]) > 1 and path[-1] != 'router_DE'
    assert leaf.dtype == (BF16 if is_matrix else np.float32), path
    np.testing.assert_array_equal(leaf[index].astype(np.float32), values.astype(np.float32))


def test_without_a_tokenizer_an_import_works_and_generate_says_what_is_missing(tmp_path, capsys):
  released.make(tmp_path / 'hf', released.model(), with_tokenizer=False)
  released.convert('import', tmp_path / 'hf', tmp_path / 'work')
  assert 'has no tokenizer.json: generate and evaluate will ask' in capsys.readouterr().out
  assert generate.main([str(tmp_path / 'work')]) == 2
  told = f'{tmp_path / "work"}: has no tokenizer.json; its weights came without one; put it there\n'
  assert capsys.readouterr().err == f'generate: {told}'


def test_a_tokenizer_that_cannot_serve_is_told_and_passed_on(tmp_path, capsys):
  released.make(tmp_path / 'hf', released.model())
  (tmp_path / 'hf' / 'tokenizer.json').write_text('{"version": "1.0"}')
  released.convert('import', tmp_path / 'hf', tmp_path / 'work')
  assert 'tokenizer.json: cannot be used by generate and evaluate: ' in capsys.readouterr().out
  assert (tmp_path / 'work' / 'tokenizer.json').read_text() == '{"version": "1.0"}'


def test_step_and_average_mean_nothing_to_an_import(v3, capsys):
  for flag in ('--step=3', '--average'):
    assert generate.main([str(v3[1]), flag]) == 2
    told = f'{flag}: {v3[1]} holds imported weights, which have neither'
    assert capsys.readouterr().err == f'generate: {told}\n'
    assert released.refused(capsys, 'export', v3[1], '/nowhere', flag) == [told]


def test_a_released_folder_where_a_workdir_is_wanted_is_told_how_to_import_it(v3, capsys):
  assert generate.main([str(v3[0])]) == 2
  assert f'dsv3_jax.weights.convert import {v3[0]} NEW_WORKDIR' in capsys.readouterr().err


# ---- train ---------------------------------------------------------------------------------------


def _run_config(**changes) -> config.Config:
  d = config.debug(config.default())
  d.update_from_flattened_dict(changes)
  return config.freeze(d)


def test_a_run_starts_from_an_import_on_any_mesh_with_fresh_moments(v3):
  c = _run_config(**{'run.init_from': str(v3[1]), 'mesh.data': 2, 'mesh.local': 2, 'mesh.zero': 3})
  fresh = workdir.start_from(v3[1], c, mesh.make_mesh(c.mesh))
  abstract = state.abstract(c, mesh.make_mesh(c.mesh))
  assert jax.tree.structure(fresh) == jax.tree.structure(abstract)
  for x, wanted in zip(jax.tree.leaves(fresh), jax.tree.leaves(abstract), strict=True):
    assert (x.shape, x.dtype, x.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
  for (path, index), values in v3[2].items():
    for slot in ('params', 'ema') if path[0] == 'params' else ('router_bias',):
      leaf = fresh[slot]
      for key in path[1:]:
        leaf = leaf[key]
      np.testing.assert_array_equal(np.asarray(leaf)[index], values.astype(np.float32))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(fresh['opt']))
  pointers = [x.unsafe_buffer_pointer() for x in
              jax.tree.leaves(jax.tree.map(lambda x: x.addressable_data(0), fresh))]  # fmt: skip
  assert len(set(pointers)) == len(pointers)  # a step donates all of it


def test_a_run_takes_the_tokenizer_of_what_it_starts_from_unless_given_one(v3, tmp_path):
  c = _run_config(**{'run.init_from': str(v3[1])})
  assert workdir.data_of(c, tmp_path / 'new').tokenizer == str(v3[1] / 'tokenizer.json')
  given = _run_config(**{'run.init_from': str(v3[1]), 'data.tokenizer': 'mine.json'})
  assert workdir.data_of(given, tmp_path / 'new') == given.data
  (tmp_path / 'tokenizer.json').write_text(
    ''
  )  # of a run that goes on, wherever its start is by now
  gone = _run_config(**{'run.init_from': str(tmp_path / 'gone')})
  assert workdir.data_of(gone, tmp_path).tokenizer == str(tmp_path / 'tokenizer.json')


def test_a_run_of_another_model_is_refused_key_by_key(v3, tmp_path):
  def told(**changes) -> list[str]:
    c = _run_config(**{'run.init_from': str(v3[1])} | changes)
    with pytest.raises(ConfigError) as error:
      workdir.data_of(c, tmp_path)
    return str(error.value).splitlines()

  place = f'run.init_from = {str(v3[1])!r}'
  assert told(**{'model.dim': 64, 'model.moe.route_scale': 1.0, 'model.norm_eps': 1e-5}) == [
    f'model.dim = 64: must be 32, as in {place}',
    f'model.norm_eps = 1e-05: must be 1e-06, as in {place}',
    f'model.moe.route_scale = 1.0: must be 2.5, as in {place}',
  ]
  assert told(**{'model.max_length': 128}) == [
    f'model.max_length = 128: must be at most model.rope.original_length = 64: {place} has YaRN off'
  ]
  free = {'model.precision': 'fp32', 'model.remat': 'block', 'model.max_length': 48}
  workdir.data_of(_run_config(**{'run.init_from': str(v3[1])} | free), tmp_path)
  nowhere = _run_config(**{'run.init_from': str(tmp_path / 'none')})
  with pytest.raises(ConfigError, match=r"^run\.init_from = '.*none': no such folder; wants "):
    workdir.data_of(nowhere, tmp_path)


def test_fine_tuning_starts_from_the_import_and_its_result_goes_out_again(tmp_path):
  """At a learning rate of nothing, what goes out is what came in, bit by bit."""
  programs = shell.Programs(tmp_path)
  overrides = (
    'model.mtp_depth=0', 'run.total_tokens=1e6', 'run.eval_every=0', 'objective.bias_speed=0',
    'optimizer.peak_lr=1e-12', 'optimizer.end_lr=0', 'optimizer.final_lr=0',
    f'run.init_from={tmp_path}/work',
  )  # fmt: skip
  c = flags.load(programs.flags()[0].partition('=')[2])
  c.model.mtp_depth = 0
  released.make(tmp_path / 'hf', config.freeze(c).model)
  released.convert('import', tmp_path / 'hf', tmp_path / 'work')
  process = programs.start('train', *programs.flags(*overrides), f'--workdir={tmp_path}/run')
  said = list(itertools.takewhile(lambda line: not line.startswith('step '), process.stdout))
  process.send_signal(signal.SIGTERM)  # which saves
  ended = shell.end(process)
  assert ended.code == 0, (said, ended)
  assert f'starts from the weights in {tmp_path}/work\n' in said
  same = [(tmp_path / name / 'tokenizer.json').read_bytes() for name in ('work', 'run')]
  assert same[0] == same[1]
  released.convert('export', tmp_path / 'run', tmp_path / 'out', '--dtype=bf16')
  released.assert_same_tensors(tmp_path / 'hf', tmp_path / 'out')
