"""Who may use a run's folder, and what comes back from it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from dsv3_jax import config, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer
from dsv3_jax.training import state, workdir
from dsv3_jax.training.checkpoint import Checkpointer, CheckpointError


def _config(**changes) -> config.Config:
  """The debug config; `changes` as {'model.dim': 16, ...}."""
  d = config.debug(config.default())
  d.model.precision = 'fp32'
  d.update_from_flattened_dict(changes)
  return config.freeze(d)


# ---- claim ---------------------------------------------------------------------------------------


def test_claim_of_a_new_folder_writes_the_config(tmp_path):
  workdir.claim(tmp_path / 'a' / 'b', _config())
  text = (tmp_path / 'a' / 'b' / workdir.CONFIG).read_text()
  assert config.from_json(text) == _config()
  assert [p.name for p in (tmp_path / 'a' / 'b').iterdir()] == [workdir.CONFIG]


def test_claim_by_the_same_config_changes_nothing(tmp_path):
  workdir.claim(tmp_path, _config())
  before = (tmp_path / workdir.CONFIG).read_text()
  workdir.claim(tmp_path, _config())
  assert (tmp_path / workdir.CONFIG).read_text() == before


def test_claim_by_another_config_names_what_differs_and_leaves_the_folder_alone(tmp_path):
  workdir.claim(tmp_path, _config())
  before = (tmp_path / workdir.CONFIG).read_text()
  other = _config(**{'optimizer.peak_lr': 1e-2, 'run.seed': 4, 'run.log_every': 7})
  with pytest.raises(ConfigError) as error:
    workdir.claim(tmp_path, other)
  assert str(error.value).splitlines() == [
    f'--workdir={tmp_path} holds a run of another config:',
    '  optimizer.peak_lr: 0.003 -> 0.01',
    '  run.seed: 0 -> 4',
    'use another --workdir, or the old values to continue that run',
  ]
  assert (tmp_path / workdir.CONFIG).read_text() == before


def _changed(value):
  if isinstance(value, bool):
    return not value
  return 'other' if isinstance(value, str) else value + 1


_FREE = {
  'mesh.pipe', 'mesh.data', 'mesh.node', 'mesh.local', 'mesh.zero', 'mesh.zero_permutes', 'checkpoint.every_steps',
  'checkpoint.keep_last', 'checkpoint.keep_every', 'run.log_every', 'run.eval_every', 'run.eval_bytes',
  'run.prompt', 'run.total_tokens', 'data.workers', 'data.cache_dir', 'model.remat', 'model.unroll', 'model.dual_batch',
  'pipeline.executor', 'pipeline.weight_part',
  'model.moe.dispatch.form', 'model.moe.dispatch.capacity',
}  # fmt: skip


@pytest.mark.parametrize('key', sorted(config.flatten(_config())))
def test_only_what_a_run_does_not_compute_from_may_change(tmp_path, monkeypatch, key):
  monkeypatch.setattr(config, 'check', lambda c: c)  # any value will do here
  workdir.claim(tmp_path, _config())
  other = _config(**{key: _changed(config.flatten(_config())[key])})
  if key in _FREE:
    workdir.claim(tmp_path, other)
    assert config.from_json((tmp_path / workdir.CONFIG).read_text()) == other
  else:
    with pytest.raises(ConfigError) as error:
      workdir.claim(tmp_path, other)
    _, line, _ = str(error.value).splitlines()
    assert line.startswith(f'  {key}: ')


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError) as error:
    workdir.claim(tmp_path / 'file' / 'run', _config())
  assert (
    str(error.value) == f'--workdir={tmp_path / "file" / "run"}: cannot be written: Not a directory'
  )


# ---- load ----------------------------------------------------------------------------------------


def _state(c: config.Config, step: int) -> state.State:
  """Values that tell apart every leaf, step, weights and their average."""
  shapes = state.abstract(c, mesh.make_mesh(c.mesh))
  leaves, tree = jax.tree.flatten(shapes)
  values = [np.full(x.shape, 100 * step + i).astype(x.dtype) for i, x in enumerate(leaves)]
  placed = [jax.device_put(v, x.sharding) for v, x in zip(values, leaves, strict=True)]
  return jax.tree.unflatten(tree, placed)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> pathlib.Path:
  """A run on four devices with ZeRO, saved at steps 1 and 2."""
  folder = tmp_path_factory.mktemp('run')
  c = _config(**{'mesh.data': 2, 'mesh.local': 2})
  workdir.claim(folder, c)
  tokenizer.train(['def f(x):\n  return x\n'], 300).save(folder / workdir.TOKENIZER)
  with Checkpointer(folder / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, _state(c, step), {})
  return folder


def _copy(run: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """The run without its checkpoints."""
  for name in (workdir.CONFIG, workdir.TOKENIZER):
    (to / name).write_text((run / name).read_text())
  return to


def _assert_holds(model, c: config.Config, step: int, slot: str) -> None:
  expected = _state(c, step)
  whole = state.layout(c).module(expected[slot], expected['router_bias'])
  assert jax.tree.structure(model) == jax.tree.structure(whole)
  for actual, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize(('step', 'average'), [(None, False), (None, True), (1, False)])
def test_load_gives_the_weights_or_their_average_of_the_newest_or_the_asked_step(
  run, step, average
):
  loaded = workdir.load(run, step=step, average=average)
  assert loaded.step == (step or 2)
  _assert_holds(loaded.model, _config(), loaded.step, 'ema' if average else 'params')
  assert loaded.tokenizer.encode('return') == tokenizer.Tokenizer(
    (run / workdir.TOKENIZER).read_text()
  ).encode('return')


def test_load_is_on_one_device_whole_unless_told_otherwise(run):
  loaded = workdir.load(run)
  assert loaded.config == dataclasses.replace(_config(), mesh=config.Mesh(zero=0))
  assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(loaded.model))
  sizes = config.Mesh(data=2, node=2, local=2, zero=0)
  loaded = workdir.load(run, sizes=sizes)
  assert loaded.config.mesh == sizes
  gate_YEDF = loaded.model.moe_layers.ffn.gate_EDF[...]
  assert gate_YEDF.sharding.shard_shape(gate_YEDF.shape)[1] == gate_YEDF.shape[1] // 4
  _assert_holds(loaded.model, _config(), 2, 'params')


def test_load_of_a_run_that_halved_its_rows_takes_any_number_of_them(run, tmp_path):
  _copy(run, tmp_path)
  (tmp_path / workdir.CHECKPOINTS).symlink_to(run / workdir.CHECKPOINTS)
  workdir.claim(tmp_path, _config(**{'model.dual_batch': True}))
  loaded = workdir.load(tmp_path)
  assert loaded.config == dataclasses.replace(_config(), mesh=config.Mesh(zero=0))


def test_missing_folder_config_tokenizer_or_checkpoint_is_one_line(run, tmp_path):
  def told() -> str:
    with pytest.raises(ConfigError) as error:
      workdir.load(tmp_path / 'run')
    return str(error.value).removeprefix(f'{tmp_path / "run"}: ')

  assert told() == 'no such folder; wants the --workdir of a training run'
  (tmp_path / 'run').mkdir()
  assert told() == 'has no config.json; wants the --workdir of a training run'
  workdir.claim(tmp_path / 'run', _config())
  assert told() == 'has no tokenizer.json; wants the --workdir of a training run'
  _copy(run, tmp_path / 'run')
  assert told() == 'has no checkpoint yet; the run writes one every 10 steps'


def test_a_step_that_is_not_there_is_one_line_with_those_that_are(run):
  with pytest.raises(CheckpointError, match=r'no checkpoint 7 in .*; there are 1, 2$'):
    workdir.load(run, step=7)


@pytest.mark.parametrize(
  ('text', 'told'),
  [
    (b'', 'is not JSON: '),
    (b'{"model": ', 'is not JSON: '),
    (b'\xff', 'is not JSON: '),
    (b'[]', 'is not the config of a run: '),
    (b'3', 'is not the config of a run: '),
    (b'{"model_type": "deepseek_v3"}', 'is not the config of a run: but of a released model; '),
    (b'{"model": {"dimm": 3}}', 'is not the config of a run: model.dimm = 3: '),
    (b'{"model": {"dim": "3"}}', "is not the config of a run: model.dim = '3': "),
    (b'{"model": {"dim": -1, "num_layers": 0}}', 'is not the config of a run: model.dim = -1: '),
  ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, text, told):
  (tmp_path / workdir.CONFIG).write_bytes(text)
  for use in (workdir.load, lambda folder: workdir.claim(folder, _config())):
    with pytest.raises(ConfigError) as error:
      use(tmp_path)
    assert str(error.value).startswith(f'{tmp_path / workdir.CONFIG}: {told}')
    assert '\n' not in str(error.value)


def test_a_tokenizer_that_cannot_serve_is_one_line(run, tmp_path):
  _copy(run, tmp_path)
  (tmp_path / workdir.TOKENIZER).write_text('{}')
  with pytest.raises(ConfigError) as error:
    workdir.load(tmp_path)
  assert str(error.value).startswith(
    f'{tmp_path / workdir.TOKENIZER}: cannot be used as a tokenizer'
  )
  values = json.loads((run / workdir.CONFIG).read_text())
  values['model']['vocab_size'] = 100
  _copy(run, tmp_path)
  (tmp_path / workdir.CONFIG).write_text(json.dumps(values))
  with pytest.raises(ConfigError, match=r'has \d+ tokens, more than model.vocab_size = 100$'):
    workdir.load(tmp_path)


def test_an_average_that_the_run_does_not_keep_is_refused(run, tmp_path):
  _copy(run, tmp_path)
  c = _config(**{'optimizer.ema_decay': 0.0})
  (tmp_path / workdir.CONFIG).write_text(config.to_json(c))
  with pytest.raises(ConfigError, match='keeps no average of the weights'):
    workdir.load(tmp_path, average=True)


def test_a_mesh_that_cannot_hold_the_model_is_refused(run):
  with pytest.raises(ConfigError, match=r'= 3: must divide model\.moe\.num_experts = 8$'):
    workdir.load(run, sizes=config.Mesh(local=3, zero=0))
  with pytest.raises(ConfigError, match=r'^mesh.pipe = 2: must be 1'):
    workdir.load(run, sizes=config.Mesh(pipe=2, zero=0))
