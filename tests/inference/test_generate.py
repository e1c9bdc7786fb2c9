"""The program, end to end on a folder of an untrained run: what it prints, and how it refuses."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from dsv3_jax import config, generate, mesh
from dsv3_jax.data import tokenizer
from dsv3_jax.training import state, workdir
from dsv3_jax.training.checkpoint import Checkpointer

_ROOT = pathlib.Path(__file__).parents[2]
_MAX_LENGTH = 64


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> pathlib.Path:
  """A run of the debug config that saved its state at steps 3 and 5."""
  folder = tmp_path_factory.mktemp('run')
  d = config.debug(config.default())
  d.model.precision = 'fp32'
  c = config.freeze(d)
  workdir.claim(folder, c)
  tokenizer.train(['def f(x):\n  return x\n'] * 3, 300).save(folder / workdir.TOKENIZER)
  with Checkpointer(folder / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    for step in (3, 5):
      checkpointer.save(step, state.init(c, mesh.make_mesh(c.mesh)), {})
  return folder


def _generate(capsys, *arguments) -> tuple[str, str]:
  assert generate.main([str(a) for a in arguments]) == 0
  return capsys.readouterr()


_FIGURES = (
  r'checkpoint 5, prefill [\d,]+ tokens at [\d,]+ tokens/s, decode [\d,]+ tokens at [\d,]+ tokens/s, '
  r'(\d+% of \d drafts right, )?cache 320 bytes per token\n'
)


def test_prompt_is_continued_and_one_line_says_how_fast(run, capsys):
  out, err = _generate(capsys, run, '--prompt=def ', '--max_tokens=8')
  assert out.strip()
  assert re.fullmatch(_FIGURES, err)  # 320 = (3 + 1) layers x (16 + 4) values x 4 bytes


def test_a_text_that_cannot_become_as_long_as_asked_is_said_to(run, capsys):
  _, err = _generate(capsys, run, '--prompt=def ', '--max_tokens=100', '--samples=2')
  assert err.endswith(f', no sequence goes beyond model.max_length = {_MAX_LENGTH} tokens\n')


def test_same_seed_same_text_other_seed_other_text(run, capsys):
  one, same, other = (
    _generate(capsys, run, f'--seed={seed}', '--max_tokens=8')[0] for seed in (1, 1, 2)
  )
  assert one == same != other


def test_each_of_a_batch_gets_the_text_that_it_gets_alone(run, capsys):
  def draw(*prompts: str) -> str:
    flags = [f'--prompt={p}' for p in prompts]
    return _generate(capsys, run, *flags, '--samples=2', '--max_tokens=8')[0]

  together = draw('def ', 'return x # and more')
  titled = re.split(r'^==> prompt (\d), sample (\d) <==\n', together, flags=re.MULTILINE)
  assert list(zip(titled[1::3], titled[2::3], strict=True)) == [
    ('1', '1'), ('1', '2'), ('2', '1'), ('2', '2'),
  ]  # fmt: skip
  alone = draw('def ') + draw('return x # and more').replace('==> prompt 1', '==> prompt 2')
  assert together == alone


def test_infill_asks_for_the_middle_in_the_order_of_the_training_data(run, monkeypatch, capsys):
  asked = []
  real = generate.stream

  def watched(engine, prompts, *args, **kwargs):
    asked.extend(prompts)
    return real(engine, prompts, *args, **kwargs)

  monkeypatch.setattr(generate, 'stream', watched)
  out, _ = _generate(capsys, run, '--prefix=def f(', '--suffix=): return x', '--max_tokens=8')
  t = tokenizer.Tokenizer((run / workdir.TOKENIZER).read_text())
  spelled = t.decode(asked[0], skip_special=False)
  assert out
  assert spelled == (
    f'{tokenizer.BOS}{tokenizer.FIM_BEGIN}def f({tokenizer.FIM_HOLE}): return x{tokenizer.FIM_END}'
  )


def test_prompt_comes_from_stdin_and_by_default_from_the_config(run, monkeypatch, capsys):
  by_flag = _generate(capsys, run, '--prompt=def ', '--max_tokens=8')[0]
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'def ')))
  assert _generate(capsys, run, '--prompt=-', '--max_tokens=8')[0] == by_flag
  assert _generate(capsys, run, '--max_tokens=8')[0] == by_flag


def test_text_comes_token_by_token_and_not_at_the_end(run, monkeypatch, capsys):
  at_each_step = []
  real = generate.stream

  def watched(*args, **kwargs):
    for tokens in real(*args, **kwargs):
      yield tokens
      at_each_step.append(capsys.readouterr().out)

  monkeypatch.setattr(generate, 'stream', watched)
  assert generate.main([str(run), '--max_tokens=8', '--temperature=0']) == 0
  assert sum(map(bool, at_each_step)) > 4


def test_an_earlier_checkpoint_and_the_average_can_be_asked_for(run, capsys):
  _, err = _generate(capsys, run, '--step=3', '--average', '--max_tokens=8')
  assert err.startswith('checkpoint 3, ')


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--temperature=-1'], 'temperature = -1.0: must be 0 (greedy) or more'),
    (['--top_p=0'], 'top_p = 0.0: must be above 0 and at most 1'),
    (['--seed=-1'], 'seed = -1: must be 0 or more'),
    (['--max_tokens=0'], 'max_tokens = 0: must be at least 1'),
    (['--samples=0'], 'samples = 0: must be at least 1'),
    (['--max_tokens=many'], "argument --max_tokens: invalid int value: 'many'"),
    (['--prompts=a'], 'unrecognized arguments: --prompts=a'),
    (['--prefix=a'], "--prefix without --suffix: infill wants both; either may be ''"),
    (['--suffix='], '--suffix without --prefix'),
    (['--prefix=a', '--suffix=', '--prompt=b'], '--prompt with --prefix and --suffix'),
    (['--prompt=' + 'é~' * 40], f'prompt 1 has 121 tokens: must have at least 1 and at most {_MAX_LENGTH - 1}'),
    (['--prompt=a\udcff'], "'a\\udcff': is not UTF-8"),
    (['--step=4'], 'no checkpoint 4 in '),
  ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_exit_code_2(run, capsys, arguments, told):
  assert generate.main([str(run), *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith(f'generate: {told}')
  assert err.count('\n') == 1


def test_stdin_that_is_not_text_is_refused(run, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'ab\xff')))
  assert generate.main([str(run), '--prompt=-']) == 2
  assert capsys.readouterr().err == 'generate: --prompt=-: stdin is not UTF-8 at byte 2\n'


def test_a_run_without_an_average_says_so(run, tmp_path, capsys):
  shutil.copytree(run, tmp_path / 'copy')
  values = json.loads((run / workdir.CONFIG).read_text())
  values['optimizer']['ema_decay'] = 0.0
  (tmp_path / 'copy' / workdir.CONFIG).write_text(json.dumps(values))
  assert generate.main([str(tmp_path / 'copy'), '--average']) == 2
  assert 'keeps no average of the weights (optimizer.ema_decay = 0)' in capsys.readouterr().err


def test_module_runs_and_a_missing_folder_is_one_line_and_exit_code_2(tmp_path):
  command = [sys.executable, '-m', 'dsv3_jax.generate', str(tmp_path / 'none')]
  done = subprocess.run(command, cwd=_ROOT, env=os.environ, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == (
    f'generate: {tmp_path / "none"}: no such folder; wants the --workdir of a training run\n'
  )
