"""Evaluation: bits per byte against a computation by hand, and gzip and xz on the same bytes."""

import dataclasses
import gzip
import json
import lzma
import math
import pathlib
import re

import jax
import numpy as np
import pytest
import shell
from jax.sharding import PartitionSpec as P

from dsv3_jax import evaluate, mesh
from dsv3_jax.data import batches, corpora
from dsv3_jax.kernels.cross_entropy import cross_entropy
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import evaluation, workdir

pytestmark = pytest.mark.xdist_group('programs')


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> shell.Programs:
  return shell.programs(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(programs, tmp_path) -> pathlib.Path:
  """A finished run, without what training wrote about it at its end."""
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  (folder / evaluation.FILE).unlink()
  return folder


def _evaluate(capsys, *arguments) -> str:
  assert evaluate.main([str(a) for a in arguments]) == 0
  out, err = capsys.readouterr()
  assert err == ''
  return out


def _saved(folder: pathlib.Path) -> dict[str, float]:
  return json.loads((folder / evaluation.FILE).read_text())


def _heldout(loaded: workdir.Loaded, size: int | None = None) -> batches.Heldout:
  c = loaded.config
  if size:
    c = dataclasses.replace(c, run=dataclasses.replace(c.run, eval_bytes=size))
  return batches.heldout_rows(c, corpora.open_corpus(c.data), loaded.tokenizer)


def _nats(loaded: workdir.Loaded, heldout: batches.Heldout) -> float:
  """Weighted nats of all rows at once, with every logit in memory."""
  m = loaded.config.model

  def nats(model: Transformer, tokens_BX: jax.Array, weight_BL: jax.Array) -> jax.Array:
    hidden_BLD, _ = model.hidden(m, model.embed(m, tokens_BX[:, :-1]))
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    rows = flat(hidden_BLD), model.head_DV[...], flat(tokens_BX[:, 1:]), flat(weight_BL)
    return jax.lax.psum(cross_entropy(*rows, implementation='reference'), mesh.TOKENS)

  device_mesh = mesh.make_mesh(loaded.config.mesh)
  specs = (P(), P(mesh.TOKENS), P(mesh.TOKENS))
  alone = jax.shard_map(nats, mesh=device_mesh, in_specs=specs, out_specs=P())
  return float(jax.jit(alone)(loaded.model, heldout.tokens, heldout.weights))


def test_bits_per_byte_are_the_reference_cross_entropy_over_the_bytes_of_the_text(run, capsys):
  out = _evaluate(capsys, run)
  loaded = workdir.load(run)
  heldout = _heldout(loaded)
  documents = list(corpora.open_corpus(loaded.config.data).heldout)
  assert heldout.text == ''.join(documents).encode()  # all of it fits into run.eval_bytes
  nats = _nats(loaded, heldout)
  saved = _saved(run)
  assert saved['heldout_bytes'] == len(heldout.text)
  assert saved['bits_per_byte'] == pytest.approx(nats / math.log(2) / len(heldout.text), rel=1e-5)
  # Each document's tokens and its end are predicted, and the beginning of all but the first.
  ids = [loaded.tokenizer.encode(document) for document in documents]
  targets = sum(len(i) + 2 for i in ids) - 1
  assert saved['heldout_loss'] == pytest.approx(nats / targets, rel=1e-5)
  assert f'\n  this model  {saved["bits_per_byte"]:7.3f} bits per byte\n' in out


def test_evaluate_repeats_the_numbers_that_training_ended_with(programs, run, capsys):
  out = _evaluate(capsys, run)
  folder, ended = programs.finished
  table = re.search(r'held-out text(.*\n){4}', ended.out)[0]
  assert out == f'checkpoint 36: {table}'
  assert _saved(run) == pytest.approx(_saved(folder), rel=1e-6)


def test_gzip_and_xz_are_python_s_own_on_the_very_same_bytes(run, capsys):
  out = _evaluate(capsys, run)
  text = _heldout(workdir.load(run)).text
  bits = {
    'gzip': 8 * len(gzip.compress(text, 9)) / len(text),
    'xz': 8 * len(lzma.compress(text, preset=9)) / len(text),
  }
  for name, value in bits.items():
    assert _saved(run)[f'{name}_bits_per_byte'] == value
    assert re.search(rf'\n  {name} -9 +{value:.3f} bits per byte\n', out)


def test_average_and_step_and_bytes_choose_the_weights_and_the_text(run, capsys):
  seen = set()
  for arguments, choice, size in (
    ([], {}, None),
    (['--average'], {'average': True}, None),
    (['--step=30'], {'step': 30}, None),
    (['--step=24', '--average', '--bytes=2000'], {'step': 24, 'average': True}, 2000),
  ):
    out = _evaluate(capsys, run, *arguments)
    loaded = workdir.load(run, **choice)
    heldout = _heldout(loaded, size)
    expected = _nats(loaded, heldout) / math.log(2) / len(heldout.text)
    assert _saved(run)['bits_per_byte'] == pytest.approx(expected, rel=1e-5)
    assert out.startswith(f'checkpoint {choice.get("step", 36)}: held-out text, ')
    assert _saved(run)['heldout_bytes'] == len(heldout.text)
    seen.add(expected)
  assert len(seen) == 4 and np.isfinite(list(seen)).all()


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--step=7'], 'no checkpoint 7 in {run}/checkpoints; there are 24, 30, 36'),
    (['--bytes=-1'], 'run.eval_bytes = -1: must be positive'),
  ],
)
def test_what_cannot_be_evaluated_gets_one_line(run, capsys, arguments, told):
  assert evaluate.main([str(run), *arguments]) == 2
  assert capsys.readouterr().err == f'evaluate: {told.format(run=run)}\n'
  assert not (run / evaluation.FILE).exists()


def test_a_corpus_that_has_gone_away_is_named(programs, run, capsys):
  path = run / workdir.CONFIG
  path.write_text(path.read_text().replace(f'{programs.root}/corpus', '/nowhere'))
  assert evaluate.main([str(run)]) == 2
  assert capsys.readouterr().err == "evaluate: data.corpus = '/nowhere': no such folder\n"
