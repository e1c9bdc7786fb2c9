"""The program, end to end on small checkpoints: what goes in comes out, and killing it changes nothing."""

import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import released

from dsv3_jax import config, generate, mesh
from dsv3_jax.training import state, workdir
from dsv3_jax.training.checkpoint import Checkpointer
from dsv3_jax.weights import convert, fp8, names, shards, store, transfer

BF16 = ml_dtypes.bfloat16


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{}, released.ODD, released.V2], ids=['v3', 'odd', 'v2'])
@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
def test_import_holds_the_numbers_of_the_checkpoint(tmp_path, changes, dtype):
  chunks = released.make(tmp_path / 'hf', released.model(changes))
  released.convert('import', tmp_path / 'hf', tmp_path / 'work', f'--dtype={dtype}')
  weights = store.open(tmp_path / 'work' / workdir.WEIGHTS)
  for (path, index), values in chunks.items():
    read = weights.read(path, index)
    assert read.dtype == (np.float32 if path[0] == 'router_bias' else store.DTYPES[dtype])
    np.testing.assert_array_equal(read.astype(np.float32), values.astype(np.float32))
  assert sum(leaf.shape[0] > 0 for leaf in weights.leaves.values()) == len({p for p, _ in chunks})


@pytest.mark.parametrize('changes', [{}, released.ODD, released.V2], ids=['v3', 'odd', 'v2'])
@pytest.mark.parametrize(
  ('dtype', 'kind'),
  [
    ('bf16', {}),
    ('fp32', {'dtype': np.float32}),
    ('fp8', {'fp8': True}),
    ('fp8', {'fp8': True, 'ue8m0': True}),
    ('fp8', {'fp8': True, 'ue8m0': True, 'scale_dtype': fp8.E8M0}),
  ],
  ids=['bf16', 'fp32', 'fp8', 'ue8m0', 'e8m0'],
)
def test_export_of_an_import_has_the_same_bits_and_says_the_same(tmp_path, changes, dtype, kind):
  released.make(tmp_path / 'hf', released.model(changes), **kind)
  released.convert('import', tmp_path / 'hf', tmp_path / 'work', f'--dtype={dtype}')
  released.convert('export', tmp_path / 'work', tmp_path / 'back', '--shard_size=80KB')
  released.assert_same_tensors(tmp_path / 'hf', tmp_path / 'back')
  read = lambda name: json.loads((tmp_path / name / 'config.json').read_text())
  assert read('hf') == read('back')
  same = [(tmp_path / name / 'tokenizer.json').read_bytes() for name in ('hf', 'back')]
  assert same[0] == same[1]
  for file in shards.Folder(tmp_path / 'back').files:
    tensors, _ = shards.read_headers(tmp_path / 'back' / file)
    assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 80_000


@pytest.mark.parametrize('kind', [{}, {'ue8m0': True}])
def test_fp8_is_dequantised_on_import_and_on_export_by_the_definition(tmp_path, kind):
  released.make(tmp_path / 'hf', released.model(released.ODD), fp8=True, **kind)
  released.convert('import', tmp_path / 'hf', tmp_path / 'kept', '--dtype=fp8')
  released.convert('import', tmp_path / 'hf', tmp_path / 'plain', '--dtype=bf16')
  released.convert('export', tmp_path / 'kept', tmp_path / 'out', '--dtype=bf16')
  theirs, out = shards.Folder(tmp_path / 'hf'), shards.Folder(tmp_path / 'out')
  for name, t in theirs.tensors.items():
    if t.dtype == fp8.E4M3:
      codes, scale = theirs.read(name), theirs.read(name + names.SCALE)
      scale = np.kron(scale, np.ones((128, 128), np.float32))[: t.shape[0], : t.shape[1]]
      wanted = (codes.astype(np.float32) * scale).astype(BF16)
      np.testing.assert_array_equal(out.read(name), wanted)
  assert not any(name.endswith(names.SCALE) for name in out.tensors)
  # What a program loads from codes is what it loads from their values.
  kept, plain = (workdir.load(tmp_path / name).model for name in ('kept', 'plain'))
  for one, two in zip(jax.tree.leaves(kept), jax.tree.leaves(plain), strict=True):
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one, two)


def test_any_import_goes_out_as_fp8_with_scales_that_give_its_values_back(tmp_path):
  released.make(tmp_path / 'hf', released.model(released.ODD))
  released.convert('import', tmp_path / 'hf', tmp_path / 'work')
  released.convert('export', tmp_path / 'work', tmp_path / 'out', '--dtype=fp8')
  released.convert('inspect', tmp_path / 'out')
  theirs, out = shards.Folder(tmp_path / 'hf'), shards.Folder(tmp_path / 'out')
  assert {n for n in out.tensors if not n.endswith(names.SCALE)} == theirs.tensors.keys()
  for name in theirs.tensors:
    x, y = theirs.read(name), out.read(name)
    if name + names.SCALE not in out.tensors:
      assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), name
      continue
    codes, scale = fp8.quantise(x)
    assert y.tobytes() == codes.tobytes(), name
    np.testing.assert_array_equal(out.read(name + names.SCALE), scale)
    values = fp8.dequantise(y, scale)
    worst = np.abs(values - x.astype(np.float32)).max() / np.abs(x.astype(np.float32)).max()
    assert worst < 2**-4, name  # half a step of three bits behind the point


def test_experts_that_transformers_stacked_are_imported_as_the_same_numbers(tmp_path):
  m = released.model()
  chunks = released.make(tmp_path / 'hf', m, shard_bytes=10**9)

  def stack(tensors) -> None:
    for layer in (1, 2, 3):
      prefix = f'model.layers.{layer}.mlp.experts.'
      take = lambda e, name, p=prefix: tensors.pop(f'{p}{e}.{name}_proj.weight')
      experts = range(m.moe.num_experts)
      both = [np.concatenate([take(e, 'gate'), take(e, 'up')]) for e in experts]
      tensors[f'{prefix}gate_up_proj'] = np.stack(both)
      tensors[f'{prefix}down_proj'] = np.stack([take(e, 'down') for e in experts])

  _edit(tmp_path / 'hf', stack)
  released.convert('inspect', tmp_path / 'hf')
  released.convert('import', tmp_path / 'hf', tmp_path / 'work')
  weights = store.open(tmp_path / 'work' / workdir.WEIGHTS)
  for (path, index), values in chunks.items():
    assert weights.read(path, index).tobytes() == values.tobytes(), path


def test_a_trained_run_is_exported_from_any_mesh_checkpoint_or_average(tmp_path):
  d = config.debug(config.default())
  d.mesh.update(data=2, local=2, zero=3)
  c = config.freeze(d)
  workdir.claim(tmp_path / 'run', c)
  states = {}
  with Checkpointer(tmp_path / 'run' / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    for step in (1, 2):
      rng = np.random.default_rng(step)
      abstract = state.abstract(c, mesh.make_mesh(c.mesh))
      made = jax.tree.map(lambda x, r=rng: r.standard_normal(x.shape).astype(x.dtype), abstract)
      states[step] = made
      placed = jax.device_put(made, jax.tree.map(lambda x: x.sharding, abstract))
      checkpointer.save(step, placed, {})
  for step, asked, slot in (
    (2, [], 'params'),
    (1, ['--step=1'], 'params'),
    (2, ['--average'], 'ema'),
  ):
    out = tmp_path / '-'.join(['out', *asked])
    released.convert('export', tmp_path / 'run', out, '--dtype=fp32', *asked)
    assert {p.name for p in out.iterdir()} <= {
      'config.json', 'model.safetensors', 'dsv3_export.json', 'tokenizer_config.json',
    }  # fmt: skip
    found = transfer.open_released(out)
    assert found.findings().lines == []
    wanted = {'params': states[step][slot], 'router_bias': states[step]['router_bias']}
    for path, index, _ in names.chunks(c.model):
      leaf = wanted
      for key in path:
        leaf = leaf[key]
      np.testing.assert_array_equal(found.read(path, index), leaf[index])


def test_a_damaged_checkpoint_and_one_that_is_not_there_are_told(tmp_path, capsys):
  c = config.freeze(config.debug(config.default()))
  workdir.claim(tmp_path / 'run', c)
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert released.refused(capsys, 'export', run, out) == [f'{run}: has no checkpoint yet']
  with Checkpointer(run / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    checkpointer.save(3, state.init(c, mesh.make_mesh(c.mesh)), {})
  assert released.refused(capsys, 'export', run, out, '--step=4') == [f'--step=4: {run} has 3']
  assert not out.exists()
  for data in (run / workdir.CHECKPOINTS / '3').glob('state/ocdbt.process_*/d/*'):
    data.write_bytes(data.read_bytes()[:10])  # all: of most of the state an export reads nothing
  assert re.search(r'checkpoints/3: \S+ cannot be read: .*; try another --step', released.refused(capsys, 'export', run, out)[-1])  # fmt: skip
  assert not _is_checkpoint(out)


# ---- killed --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def forks():
  """Processes that have the program imported already."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['dsv3_jax.weights.convert'])
  return context


def _start(forks, *arguments):
  process = forks.Process(target=convert.main, args=([str(a) for a in arguments],))
  process.start()
  return process


def _count(folder: pathlib.Path) -> int:
  """Files in a folder, which may be changing."""
  return sum(len(files) for _, _, files in os.walk(folder))


def _kill_at_random(process, folder: pathlib.Path, files: int, rng: random.Random) -> None:
  """Kills a conversion when it has written some more files, at most `files` in all."""
  here = _count(folder)
  wanted = rng.randint(here + 1, max(files - 1, here + 1))
  while process.is_alive() and _count(folder) < wanted:
    time.sleep(rng.uniform(0, 0.002))
  time.sleep(rng.uniform(0, 0.01))
  process.kill()
  process.join()


def test_killed_anywhere_and_run_again_import_and_export_give_the_same_files(forks, tmp_path):
  m = released.model({'model.num_layers': 4, 'model.moe.num_experts': 16})
  released.make(tmp_path / 'hf', m, fp8=True)
  rng = random.Random(0)
  for name, is_whole, command, *more in (
    ('work', lambda to: store.is_whole(to / 'weights'), ['import', tmp_path / 'hf'], '--dtype=fp8'),
    ('back', _is_checkpoint, ['export', tmp_path / 'work'], '--shard_size=60KB'),
  ):
    assert convert.main([str(a) for a in [*command, tmp_path / name, *more]]) == 0
    wanted, killed = released.files(tmp_path / name), tmp_path / f'{name}-killed'
    cut = 0
    for _ in range(40):
      if cut == 3:
        break
      if is_whole(killed):  # that kill came too late
        shutil.rmtree(killed)
      process = _start(forks, *command, killed, *more)
      _kill_at_random(process, killed, _count(tmp_path / name), rng)
      cut += process.exitcode == -signal.SIGKILL
      # Either the manifest or index is not there, or everything is.
      assert not is_whole(killed) or released.files(killed) == wanted
    assert cut == 3
    assert convert.main([str(a) for a in [*command, killed, *more]]) == 0
    assert released.files(killed) == wanted


def _is_checkpoint(folder: pathlib.Path) -> bool:
  try:
    shards.Folder(folder)
  except shards.FormatError:
    return False
  return True


def test_what_a_killed_import_left_is_refused_by_the_programs(v3, tmp_path, capsys):
  released.convert('import', v3[0], tmp_path / 'work')
  manifest = tmp_path / 'work' / workdir.WEIGHTS / store.MANIFEST
  manifest.rename(manifest.with_name(store.PLAN))
  capsys.readouterr()
  told = f'{tmp_path / "work" / workdir.WEIGHTS}: holds a conversion that was not finished\n'
  assert generate.main([str(tmp_path / 'work')]) == 2
  assert capsys.readouterr().err == f'generate: {told}'
  assert released.refused(capsys, 'export', tmp_path / 'work', tmp_path / 'out') == [told.strip()]
  assert not (tmp_path / 'out').exists()


# ---- what cannot work writes nothing -------------------------------------------------------------


def _edit(folder: pathlib.Path, change) -> None:
  """Rewrites a checkpoint of one file with its tensors changed."""
  found = shards.Folder(folder)
  tensors = {name: found.read(name) for name in found.tensors}
  change(tensors)
  for file in found.files:
    (folder / file).unlink()
  specs = [(name, x.dtype, x.shape) for name, x in tensors.items()]
  writer = shards.Writer(folder, specs, 10**9, {'format': 'pt'})
  writer.write_shard(writer.shards()[0], tensors.__getitem__)
  writer.finish()


_NORM = 'model.layers.1.input_layernorm.weight'
_UP = 'model.layers.1.mlp.experts.3.up_proj.weight'
_COPY = 'model.layers.3.embed_tokens.weight'


def _nan(x: np.ndarray) -> np.ndarray:
  x[-1, -1] = np.nan
  return x


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    (lambda t: t.pop(_NORM), rf'missing {_NORM} \[32\]'),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), r'extra extra \[3\]'),
    (lambda t: t.update({_NORM: t[_NORM][:-1]}), rf'misshaped {_NORM} \[31\]: must be \[32\]'),
    (lambda t: t.update({_NORM: t[_NORM].astype(np.int32)}), rf'mistyped {_NORM} int32: must be '),
    (lambda t: _nan(t[_UP + names.SCALE]), rf'{_UP}_scale_inv holds nan; scales must be finite'),
    (lambda t: t[_UP + names.SCALE].fill(0), rf'{_UP}_scale_inv holds 0\.0; scales must be finite'),
    (lambda t: t[_COPY].fill(1), rf'{_COPY}: differs from model.embed_tokens.weight in rows 0'),
  ],
  ids=['missing', 'extra', 'shape', 'dtype', 'nan', 'zero', 'copy'],
)
def test_a_checkpoint_with_a_fault_is_told_and_nothing_is_written(tmp_path, capsys, change, told):
  released.make(tmp_path / 'hf', released.model(), fp8=True, shard_bytes=10**9)
  _edit(tmp_path / 'hf', change)
  (line,) = released.refused(capsys, 'import', tmp_path / 'hf', tmp_path / 'work')
  assert str(tmp_path / 'hf') in line or _COPY in line
  assert re.search(told, line), line
  assert not (tmp_path / 'work').exists()


def test_a_code_that_is_nan_is_told_and_the_import_never_becomes_whole(tmp_path, capsys):
  released.make(tmp_path / 'hf', released.model(), fp8=True, shard_bytes=10**9)
  _edit(tmp_path / 'hf', lambda t: _nan(t[_UP]))
  for dtype in ('bf16', 'fp8'):
    (line,) = released.refused(
      capsys, 'import', tmp_path / 'hf', tmp_path / dtype, f'--dtype={dtype}'
    )[-1:]
    assert _UP in line and 'holds NaN' in line
    assert not store.is_whole(tmp_path / dtype / workdir.WEIGHTS)


def test_fp8_of_a_checkpoint_without_codes_is_refused(v3, tmp_path, capsys):
  (line,) = released.refused(capsys, 'import', v3[0], tmp_path / 'work', '--dtype=fp8')
  assert re.match(r'--dtype=fp8: model\.layers\S+ in .* is bfloat16; use bf16 or fp32$', line)
  assert not (tmp_path / 'work').exists()


def test_a_target_that_holds_something_else_is_left_alone(v3, tmp_path, capsys):
  released.make(tmp_path / 'other', released.model(), seed=1)
  before = released.files(v3[1])
  (line,) = released.refused(capsys, 'import', tmp_path / 'other', v3[1])
  assert line.endswith('or remove this one')
  assert released.files(v3[1]) == before
  before = released.files(v3[0])
  (line,) = released.refused(capsys, 'export', v3[1], v3[0])
  assert 'already; name an empty folder' in line
  assert released.files(v3[0]) == before
  (tmp_path / 'run' / workdir.CHECKPOINTS).mkdir(parents=True)
  (line,) = released.refused(capsys, 'import', v3[0], tmp_path / 'run')
  assert line == f'{tmp_path / "run"}: holds a training run; name a new folder'


def test_the_same_import_again_changes_nothing(v3, capsys):
  before = released.files(v3[1])
  released.convert('import', v3[0], v3[1])
  assert f'{v3[1]} holds these weights already' in capsys.readouterr().out
  assert released.files(v3[1]) == before


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ([], 'required: import|export|inspect'),
    (['import', 'a'], 'required: WORKDIR; --help shows what there is'),
    (['import', 'a', 'b', '--dtype=int8'], "invalid choice: 'int8'"),
    (['export', 'a', 'b', '--shard_size=many'], '--shard_size=many: must be a size such as 5GB'),
    (['import', '/nowhere', 'b'], '/nowhere: no such folder'),
    (
      ['export', '/nowhere', 'b'],
      '/nowhere: has no config.json; wants the --workdir of a training run',
    ),
    (['inspect', '/nowhere'], '/nowhere: no such folder'),
  ],
)
def test_a_command_that_cannot_work_is_one_line(capsys, arguments, told):
  (line,) = released.refused(capsys, *arguments)
  assert told in line


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_says_what_there_is_and_lists_every_fault(tmp_path, capsys, v3):
  released.convert('inspect', v3[0])
  out = capsys.readouterr().out
  assert 'deepseek_v3, not quantised; ' in out and out.endswith('or of another shape or dtype\n')
  released.make(tmp_path / 'hf', released.model(), fp8=True, ue8m0=True, shard_bytes=10**9)

  def change(tensors) -> None:
    del tensors[_NORM]
    tensors['a'] = tensors['b'] = np.zeros(2, np.float32)

  _edit(tmp_path / 'hf', change)
  assert convert.main(['inspect', str(tmp_path / 'hf')]) == 1
  lines = capsys.readouterr().out.splitlines()
  assert 'FP8, UE8M0 scales' in lines[0]
  assert lines[-4:] == [f'missing {_NORM} [32]', 'extra a [2]', 'extra b [2]', '3 faults']


def test_inspect_of_an_import_finds_a_chunk_that_is_gone(v3, tmp_path, capsys):
  folder = shutil.copytree(v3[1], tmp_path / 'work')
  released.convert('inspect', folder)
  assert 'imported weights, ' in capsys.readouterr().out
  (folder / workdir.WEIGHTS / 'params.final_norm_D' / 'c.0').unlink()
  assert convert.main(['inspect', str(folder)]) == 1
  assert capsys.readouterr().out.endswith('missing params.final_norm_D[]\n')
