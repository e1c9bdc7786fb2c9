"""Training as a user starts it: what a run leaves, how it continues, how it refuses."""

import pathlib
import random
import re
import shutil
import time

import numpy as np
import pytest
import shell

from dsv3_jax import config, evaluate, flags, generate, train
from dsv3_jax.config import ConfigError
from dsv3_jax.training import metrics, workdir

pytestmark = pytest.mark.xdist_group('programs')


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> shell.Programs:
  return shell.programs(tmp_path_factory.getbasetemp())


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_says_what_trains_how_fast_how_well_and_where_it_all_lies(programs):
  folder, ended = programs.finished
  assert (ended.code, ended.err) == (0, '')
  said = ended.out
  assert re.match(
    r'quickstart-debug-\S+: 75\.1K parameters, 56\.3K active per token; 1 cpu device\n', said
  )
  assert re.search(r'corpus: \d+ training and \d+ held-out documents, .* bytes per token\n', said)
  assert re.search(r'\nstep 36/36 100%  loss \d\.\d{4}  \S+ tokens/s  left 0:00:00\n', said)
  assert re.search(
    r'\nmodel FLOP/s \S+G \(\S+ MFLOP per token\) = \d\.\d\d of a plain .* dot here', said
  )
  assert re.search(
    r'\nheld-out text, [\d,]+ bytes, \d\.\d{4} nats per token\n  this model +\d', said
  )
  sample = said[said.index('\nsample:\n') :]
  assert sample.startswith('\nsample:\ndef ') and len(sample) > 60
  lies = f'{folder} holds config.json, metrics.jsonl, tensorboard/, checkpoints/; report: {folder}/report.png'
  assert said.splitlines()[-1] == lies


def test_a_run_leaves_what_it_says(programs):
  folder, _ = programs.finished
  assert {path.name for path in folder.iterdir()} == {
    'config.json', 'tokenizer.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'report.png',
    'evaluation.json',
  }  # fmt: skip
  assert (folder / 'report.png').read_bytes().startswith(b'\x89PNG')
  (events,) = (folder / 'tensorboard').iterdir()
  assert events.name.startswith('events.out.tfevents.') and events.stat().st_size > 36 * 200
  assert shell.steps(folder) == [24, 30, 36]  # checkpoint.keep_last = 3


def test_the_record_has_every_step_once_with_every_documented_key(programs):
  lines = metrics.read(programs.finished[0])
  assert [line['step'] for line in lines] == list(range(1, shell.STEPS + 1))
  assert [line['tokens'] for line in lines] == [256 * step for step in range(1, shell.STEPS + 1)]
  heldout = {'heldout_loss', 'heldout_bpb'}
  rates = {'tokens_per_s', 'flops_per_s'}
  keys = (
    set(re.findall(r'\b[a-z_]{2,}\b', metrics.__doc__.split('Keys of a line:')[1]))
    & lines[14].keys()
  )
  assert keys == lines[14].keys()  # all are documented
  assert {'loss', 'ce', 'mtp', 'balance', 'lr', 'grad_norm', 'max_load', 'mean_load', 'load'} < keys
  for line in lines:
    rest = keys - heldout - rates
    rest |= heldout if line['step'] % 15 == 0 else set()
    rest |= rates if line['step'] > 1 else set()  # the first one compiles
    assert line.keys() == rest
    assert np.all(np.isfinite([value for key, value in line.items() if key != 'load']))
    assert np.shape(line['load']) == (3, 8)
    np.testing.assert_allclose(np.mean(line['load'], axis=1), 1, atol=1e-3)
  assert lines[-1]['loss'] < lines[0]['loss'] - 1


# ---- continuing ----------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_was_never_interrupted(
  programs, tmp_path
):
  rng = random.Random(0)
  saving = lambda: any((tmp_path / workdir.CHECKPOINTS).glob('*tmp*'))
  for moment in ('starting', 'saving', 'training', 'saving'):
    saved = shell.steps(tmp_path)
    process = programs.start('train', *programs.flags(), f'--workdir={tmp_path}')
    if moment != 'starting':
      shell.wait_until(lambda: shell.steps(tmp_path) != saved, process)
    if moment == 'saving':
      shell.wait_until(saving, process)
    else:
      time.sleep(rng.uniform(0.0, {'starting': 4.0, 'training': 0.5}[moment]))
    assert process.poll() is None, shell.end(process)
    shell.kill(process)
  ended = programs.train(tmp_path)
  assert (ended.code, ended.err) == (0, '')
  assert re.search(rf'\ncontinues from checkpoint \d+ in {tmp_path}\n', ended.out)
  shell.assert_same_run(tmp_path, programs.finished[0])
  assert not saving()  # what the killed ones left half written is gone
  table = r'\nheld-out text(.*\n){4}'
  assert re.search(table, ended.out)[0] == re.search(table, programs.finished[1].out)[0]


def test_sigterm_saves_the_step_it_stopped_at_and_says_how_to_continue(programs):
  folder, ended = programs.stopped
  assert (ended.code, ended.err) == (0, '')
  assert ended.out.endswith(f'stopped by a signal; saved in {folder}; the same command continues\n')
  last = metrics.read(folder)[-1]['step']
  assert last < shell.STEPS and shell.steps(folder)[-1] == last


def test_a_run_started_on_one_device_goes_on_over_eight_with_the_same_losses(
  programs, tmp_path, capsys
):
  folder = programs.copy_of(programs.stopped, tmp_path / 'run')
  sizes = ('mesh.data=2', 'mesh.node=2', 'mesh.local=2', 'mesh.zero=3')
  ended = programs.train(folder, *sizes)
  assert (ended.code, ended.err) == (0, '')
  assert '; 8 cpu devices\n' in ended.out
  one, eight = shell.record(programs.finished[0]), shell.record(folder)
  assert [line['step'] for line in eight] == [line['step'] for line in one]
  for key in ('loss', 'ce', 'mtp', 'heldout_loss'):
    values = [[line[key] for line in lines if key in line] for lines in (one, eight)]
    np.testing.assert_allclose(*values, rtol=1e-4)
  # What it left is read on one device.
  assert evaluate.main([str(folder)]) == 0
  table = re.search(r'held-out text(.*\n){4}', ended.out)[0]
  assert capsys.readouterr().out == f'checkpoint 36: {table}'
  assert generate.main([str(folder), '--max_tokens=4']) == 0
  assert capsys.readouterr().out.strip()


# ---- damage and full disks -----------------------------------------------------------------------


def test_where_the_newest_checkpoint_is_damaged_all_programs_say_so_and_use_the_one_before(
  programs, tmp_path, caplog, capsys
):
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  shell.cut(folder, [36])
  told = rf'damaged in {folder}/checkpoints: checkpoint 36 \(.*\); using checkpoint 30$'
  ended = programs.run('evaluate', folder)
  assert ended.code == 0 and ended.out.startswith('checkpoint 30: held-out text')
  assert shell.one_line(ended.err, told)
  assert generate.main([str(folder), '--max_tokens=4']) == 0
  assert capsys.readouterr().err.startswith('checkpoint 30, prefill')
  assert re.search(told, caplog.messages[-1])
  ended = programs.train(folder)
  assert ended.code == 0 and '\ncontinues from checkpoint 30 in' in ended.out
  damaged, aside = ended.err.splitlines()
  assert re.search(told, damaged)
  assert aside.endswith('36.superseded: the run goes on from 30')
  shell.assert_same_run(folder, programs.finished[0])


def test_where_every_checkpoint_is_damaged_all_programs_stop_with_one_line_and_touch_nothing(
  programs, tmp_path, capsys
):
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  shell.cut(folder, shell.steps(folder))
  before = _contents(folder)
  told = rf'no usable checkpoint in {folder}/checkpoints: checkpoint 36 \(.*\), checkpoint 30 \(.*'
  told += r'; move the directory away to start afresh$'
  ended = programs.train(folder)
  assert ended.code == 1 and shell.one_line(ended.err, f'^train: {told}')
  for name, program in (('evaluate', evaluate), ('generate', generate)):
    assert program.main([str(folder)]) == 2
    assert shell.one_line(capsys.readouterr().err, f'^{name}: {told}')
  assert _contents(folder) == before


def test_a_run_stopped_by_sigterm_and_then_by_a_full_disk_continues_to_the_bits_of_the_undisturbed(
  programs, tmp_path
):
  folder = programs.copy_of(programs.stopped, tmp_path / 'run')
  kept = shell.steps(folder)
  ended = programs.train(folder, file_kib=200)
  step = (kept[-1] // shell.SAVE_EVERY + 1) * shell.SAVE_EVERY
  told = (
    rf'^train: checkpoint {step} in {folder}/checkpoints could not be written: .*File too large; '
  )
  assert ended.code == 1
  assert shell.one_line(ended.err, told + rf'the newest one on disk is {kept[-1]}$')
  assert [p.name for p in (folder / workdir.CHECKPOINTS).iterdir()] == [str(s) for s in kept]
  ended = programs.train(folder)
  assert (ended.code, ended.err) == (0, '')
  shell.assert_same_run(folder, programs.finished[0])


def test_a_disk_too_full_for_the_record_ends_the_run_in_one_line_that_names_the_file(
  programs, tmp_path
):
  ended = programs.train(tmp_path, 'checkpoint.every_steps=100', file_kib=9)
  told = rf'^train: {tmp_path}/(metrics.jsonl|tensorboard): cannot be written: File too large; '
  assert ended.code == 1 and shell.one_line(ended.err, told)


def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_what_made_it(
  programs, tmp_path
):
  ended = programs.train(tmp_path, 'optimizer.peak_lr=1e30', 'checkpoint.every_steps=1')
  lines = metrics.read(tmp_path)
  step = lines[-1]['step']
  broken = [line['step'] for line in lines if None in line.values()]
  assert broken == [step] and step < 6
  assert ended.code == 1
  assert shell.one_line(ended.err, rf'^train: .* is (nan|inf).* at step {step}; .* are kept; ')
  assert shell.steps(tmp_path)[-1] == step - 1
  for kept in shell.steps(tmp_path):
    arrays, _ = shell.final(tmp_path, kept)
    assert all(np.isfinite(x).all() for x in arrays.values())


# ---- refusals ------------------------------------------------------------------------------------


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.parametrize(
  ('override', 'told'),
  [
    ('--config.model.num_layer=3', 'no such key; did you mean model.num_layers?'),
    ('--config.model.dim=wide', 'must be a whole number'),
    ('--config.mesh.data=16', 'batch.micro_size = 8: must be a multiple of 16'),
  ],
)  # fmt: skip
def test_a_command_that_cannot_work_gets_one_line_and_leaves_no_workdir(
  programs, tmp_path, override, told
):
  ended = programs.run('train', *programs.flags(), override, f'--workdir={tmp_path}/run')
  assert (ended.code, ended.out) == (2, '')
  assert shell.one_line(ended.err, re.escape(told))
  assert override.partition('=')[0].partition('.')[2] in ended.err or 'micro_size' in ended.err
  assert not (tmp_path / 'run').exists()


def test_without_workdir_the_line_asks_for_it(programs):
  ended = programs.run('train', *programs.flags())
  assert (ended.code, ended.out) == (2, '')
  assert (
    ended.err == '--workdir: is missing; wants a folder for checkpoints, metrics and the report\n'
  )


@pytest.fixture
def refusal(programs, tmp_path):
  """The line of a ConfigError of `train`, which must leave no new workdir behind."""

  def refuse(*overrides: str) -> str:
    d = flags.load(f'{shell.ROOT}/configs/quickstart.py:debug')
    given = dict(flag[9:].split('=', 1) for flag in programs.flags(*overrides)[1:])
    flat = config.flatten(config.freeze(d))
    d.update_from_flattened_dict({key: type(flat[key])(text) for key, text in given.items()})
    with pytest.raises(ConfigError) as error:
      train.train(config.freeze(d), str(tmp_path / 'run'), 'name')
    assert not (tmp_path / 'run').exists()
    return str(error.value)

  return refuse


def test_a_mesh_larger_than_the_machine_is_refused_with_both_sizes(refusal):
  told = refusal('mesh.data=32', 'batch.micro_size=32', 'batch.size=32', 'batch.start_size=32')
  assert told.startswith(
    'mesh = pipe 1 x data 32 x node 1 x local 1 = 32 devices: only 16 cpu devices'
  )
  assert '\n' not in told and 'JAX_NUM_CPU_DEVICES=32' in told


@pytest.mark.parametrize(
  ('files', 'told'),
  [
    (None, 'no such folder'),
    ({}, 'holds no text in files that end in'),
    ({'a.txt': b''}, 'holds no text in files that end in'),
    ({'a.txt': b'one', 'b.txt': b'\xff\xfe'}, 'b.txt: is not UTF-8'),
    ({'a.jsonl': b'{"txt": "one"}'}, "data.text_key = 'text': no such field"),
    ({'a.txt': b'one'}, 'data.heldout = 0.2: leaves none of 1 documents for'),
  ],
)
def test_a_corpus_that_is_missing_empty_or_not_text_is_refused_in_one_line(
  refusal, tmp_path, files, told
):
  corpus = tmp_path / 'text'
  if files is not None:
    corpus.mkdir()
    for name, content in files.items():
      (corpus / name).write_bytes(content)
  line = refusal(f'data.corpus={corpus}')
  assert told in line and '\n' not in line
  assert str(corpus) in line or 'data.heldout' in line


def test_a_corpus_file_that_cannot_be_opened_is_named_in_one_line(programs, tmp_path):
  corpus = shutil.copytree(programs.root / 'corpus', tmp_path / 'text')
  (corpus / 'lost.txt').symlink_to(tmp_path / 'nowhere')
  ended = programs.train(tmp_path / 'run', f'data.corpus={corpus}')
  assert ended.code == 1
  assert ended.err == f'train: {corpus}/lost.txt: No such file or directory\n'
  assert not (tmp_path / 'run').exists()


def test_a_workdir_of_another_config_is_refused_with_the_keys_that_differ_and_left_alone(
  programs, tmp_path
):
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  before = _contents(folder)
  ended = programs.train(folder, 'optimizer.peak_lr=0.1', 'run.seed=3', 'run.log_every=7')
  assert (ended.code, ended.out) == (2, '')
  assert ended.err.splitlines() == [
    f'--workdir={folder} holds a run of another config:',
    '  optimizer.peak_lr: 0.003 -> 0.1',
    '  run.seed: 0 -> 3',
    'use another --workdir, or the old values to continue that run',
  ]
  assert _contents(folder) == before


def test_a_run_whose_corpus_has_changed_is_refused_and_keeps_its_tokenizer(programs, tmp_path):
  corpus = shutil.copytree(programs.root / 'corpus', tmp_path / 'text')
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  text = (folder / workdir.CONFIG).read_text()
  text = text.replace(f'{programs.root}/corpus', str(corpus))
  (folder / workdir.CONFIG).write_text(text)
  (corpus / 'more.txt').write_text('other ' * 200)
  before = _contents(folder)
  ended = programs.train(folder, f'data.corpus={corpus}')
  assert ended.code == 2
  assert shell.one_line(
    ended.err, r'^fingerprint of data.corpus = .*; resume with that, or start a new run$'
  )
  assert _contents(folder) == before


@pytest.mark.parametrize('program', [evaluate, generate], ids=['evaluate', 'generate'])
def test_what_is_not_trained_yet_cannot_be_evaluated_or_continued(
  programs, tmp_path, capsys, program
):
  name = program.__name__.rpartition('.')[2]
  assert program.main([str(tmp_path / 'nowhere')]) == 2
  err = capsys.readouterr().err
  assert (
    err == f'{name}: {tmp_path}/nowhere: no such folder; wants the --workdir of a training run\n'
  )
  folder = programs.copy_of(programs.finished, tmp_path / 'run')
  shutil.rmtree(folder / workdir.CHECKPOINTS)
  assert program.main([str(folder)]) == 2
  told = 'has no checkpoint yet; the run writes one every 6 steps'
  assert capsys.readouterr().err == f'{name}: {folder}: {told}\n'
