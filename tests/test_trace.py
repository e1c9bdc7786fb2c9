"""The program that records routing: what it writes is what a forward pass chooses."""

import pathlib

import jax
import numpy as np
import parity
import pytest
import shell
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax import trace as program
from dsv3_jax.data import batches, corpora
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel import trace
from dsv3_jax.training import workdir

pytestmark = pytest.mark.xdist_group('programs')


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> shell.Programs:
  return shell.programs(tmp_path_factory.getbasetemp())


def _record(capsys, tmp_path, *arguments) -> tuple[trace.Trace, str]:
  out = tmp_path / 'trace.npz'
  assert program.main([f'--out={out}', *map(str, arguments)]) == 0
  told, err = capsys.readouterr()
  assert err == ''
  return trace.load(out), told


def _counts(model: Transformer, c: config.Config, tokens_BL: np.ndarray) -> np.ndarray:
  """Tokens of each expert in each layer, as the balancing counts them."""
  run = lambda model, x_BL: model.hidden(c.model, model.embed(c.model, x_BL))[1].counts_E
  specs = P(), P()
  alone = jax.shard_map(run, mesh=mesh.make_mesh(c.mesh), in_specs=specs, out_specs=P())
  return np.asarray(jax.jit(alone)(model, tokens_BL))


def test_counts_of_the_held_out_text_are_those_of_a_forward_pass(programs, capsys, tmp_path):
  run = programs.finished[0]
  found, told = _record(capsys, tmp_path, run)
  loaded = workdir.load(run)
  c = loaded.config
  heldout = batches.heldout_rows(c, corpora.open_corpus(c.data), loaded.tokenizer)
  whole = int(heldout.weights.sum()) // c.batch.seq_len  # rows; the last one has padding
  assert whole == len(heldout.tokens) - 1
  assert found.tokens == heldout.weights.sum() > whole * c.batch.seq_len
  expected = _counts(loaded.model, c, heldout.tokens[:whole, :-1])
  for layer, ids_TK in enumerate(found.ids_YTK[:, : whole * c.batch.seq_len]):
    np.testing.assert_array_equal(np.bincount(ids_TK.ravel(), minlength=8), expected[layer])
  assert (found.layers, found.top_k, found.num_experts) == (2, 2, 8)
  assert (found.model, found.step, found.rows) == (str(run), 36, whole + 1)
  assert found.config == {**found.config, 'batch': vars(c.batch)}
  assert told.startswith(f'checkpoint 36: {found.tokens:,} tokens in 2 layers; fullest expert ')


def test_tokens_step_average_and_text_choose_what_is_recorded(programs, capsys, tmp_path):
  run = programs.finished[0]
  whole, _ = _record(capsys, tmp_path, run)
  part, _ = _record(capsys, tmp_path, run, '--tokens=70')
  np.testing.assert_array_equal(part.ids_YTK, whole.ids_YTK[:, :70])
  assert (part.rows, part.seq_len) == (3, 32)
  other, _ = _record(capsys, tmp_path, run, '--step=24', '--average')
  assert other.step == 24 and np.any(other.ids_YTK != whole.ids_YTK)
  # The first held-out document begins the stream, so that its text alone gives the same choices.
  loaded = workdir.load(run)
  document = corpora.open_corpus(loaded.config.data).heldout[0]
  (tmp_path / 'text').write_text(document, encoding='utf-8')
  text, _ = _record(capsys, tmp_path, run, f'--text={tmp_path}/text')
  assert text.tokens == len(loaded.tokenizer.encode(document)) + 1
  np.testing.assert_array_equal(text.ids_YTK, whole.ids_YTK[:, : text.tokens])


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['{run}'], 'the following arguments are required: --out; --help shows what there is'),
    (['{run}', '--out={tmp}/no/a.npz'], '--out={tmp}/no/a.npz: there is no folder {tmp}/no'),
    (['{run}', '--out={tmp}'], '--out={tmp}: is a folder; wants a file'),
    (['{run}', '--out={tmp}/a', '--tokens=0'], '--tokens=0: must be at least 1'),
    (['{run}', '--out={tmp}/a', '--step=7'], 'no checkpoint 7 in {run}/checkpoints; there are 24, 30, 36'),
    (['{run}', '--out={tmp}/a', '--text={tmp}/b'], '{tmp}/b: No such file or directory'),
    (['{run}', '--out={tmp}/a', '--text={tmp}/latin'], '--text={tmp}/latin: is not UTF-8 at byte 3'),
    (['{tmp}/none', '--out={tmp}/a'], '{tmp}/none: no such folder; wants the --workdir of a training run'),
  ],
)  # fmt: skip
def test_what_cannot_be_recorded_gets_one_line(programs, capsys, tmp_path, arguments, told):
  (tmp_path / 'latin').write_bytes(b'caf\xe9')
  places = {'run': programs.finished[0], 'tmp': tmp_path}
  assert program.main([a.format(**places) for a in arguments]) == 2
  assert capsys.readouterr().err == f'trace: {told.format(**places)}\n'
  assert [path.name for path in tmp_path.iterdir()] == ['latin']


# ---- choices of a random model -------------------------------------------------------------------

_SIZES = {
  'model.moe.num_experts': 16,
  'model.moe.num_groups': 8,
  'model.moe.top_groups': 2,
  'model.moe.top_k': 4,
  'model.init_std': 0.3,
}


def _random(changes: dict | None = None) -> tuple[config.Config, np.ndarray]:
  """Choices [Y, B, L, K] of a random model on random tokens."""
  c = parity.small(_SIZES | (changes or {}))
  model = Transformer(c.model, jax.random.key(0))
  tokens_BL = np.random.default_rng(0).integers(0, c.model.vocab_size, (4, 32), np.int32)
  return c, np.asarray(program.make_choices(c.model, mesh.make_mesh(c.mesh))(model, tokens_BL))


def test_no_token_has_experts_in_more_groups_than_it_may():
  c, ids_YBLK = _random()
  groups = [len(set(ids_K // 2)) for ids_K in ids_YBLK.reshape(-1, 4)]
  assert set(groups) == {2}  # groups of two experts: four need both
  assert ids_YBLK.shape == (c.model.num_layers - c.model.num_dense_layers, 4, 32, 4)
  assert len(np.unique(ids_YBLK)) > 12


def test_two_halves_of_the_rows_choose_what_all_of_them_choose():
  _, single = _random()
  _, dual = _random({'model.dual_batch': True})
  np.testing.assert_array_equal(dual, single)


def test_a_token_chooses_the_same_alone_and_among_others():
  c, ids_YBLK = _random()
  model = Transformer(c.model, jax.random.key(0))
  tokens_BL = np.random.default_rng(0).integers(0, c.model.vocab_size, (4, 32), np.int32)
  chosen = program.make_choices(c.model, mesh.make_mesh(c.mesh))(model, tokens_BL[2:3, :9])
  np.testing.assert_array_equal(np.asarray(chosen)[:, 0], ids_YBLK[:, 2, :9])


def test_the_file_is_whole_or_not_there(programs, tmp_path):
  ended = programs.run(
    'trace', programs.finished[0], f'--out={tmp_path}/trace.npz', '--tokens=100', file_kib=0
  )
  # Above it JAX says that it could not keep the compiled program.
  assert ended.code == 2
  assert ended.err.splitlines()[-1] == f'trace: {tmp_path}/trace.npz: File too large'
  assert not pathlib.Path(tmp_path, 'trace.npz').exists()
