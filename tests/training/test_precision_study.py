"""The study of precision recipes: what it computes of losses, shows, and keeps between commands."""

import json

import numpy as np
import pytest

from dsv3_jax.training import precision_study as study

_BASE = 3 + np.random.default_rng(0).normal(0, 0.1, 200)


def test_losses_are_averaged_exponentially_from_the_first_on():
  got = study.smooth(np.array([1.0, 2.0, 4.0]))
  np.testing.assert_allclose(got, [1.0, 1.1, 0.9 * 1.1 + 0.4])


def test_errors_are_of_smoothed_losses_in_the_second_half():
  assert study.errors(_BASE, _BASE) == (0, 0, 0)
  assert study.errors(1.002 * _BASE, _BASE) == pytest.approx((0.002, 0.002, 0.002))
  early = _BASE.copy()
  early[0] += 1  # averaged away a hundred steps later
  assert study.errors(early, _BASE)[1] < 1e-4
  assert study.errors(-0.002 * _BASE + _BASE, _BASE)[2] == pytest.approx(-0.002)


def test_table_tells_who_is_above_the_bar_and_the_picture_has_both_panels():
  losses = {
    'bf16': _BASE,
    'fp8': 1.001 * _BASE,
    'broken': np.full(200, np.nan),
    'off': _BASE + 0.03,
  }
  told = study.table(losses).splitlines()
  assert 'below 0.25 %' in told[2] and '+0.100 %' in told[2]
  assert 'ABOVE' in told[3] and 'ABOVE' in told[4]
  above, below = study.draw(losses).axes
  assert len(above.lines) == 4 and len(below.lines) == 3 + 2 + 1
  for line, values in zip(above.lines, losses.values(), strict=True):
    np.testing.assert_array_equal(line.get_ydata(), study.smooth(values))


@pytest.fixture
def command(tmp_path, monkeypatch):
  """Runs the study with `train` replaced; what it asked for."""
  asked = []

  def train(c):
    asked.append(c.model.precision)
    return list(3.0 + np.arange(4) / 10)

  monkeypatch.setattr(study, 'train', train)

  def run(*arguments, config='configs/precision_study.py'):
    code = study.main([f'--config={config}', f'--workdir={tmp_path}', *arguments])
    told, asked[:] = list(asked), []
    return code, told

  return run, tmp_path


def test_the_same_command_goes_on_where_it_stopped_and_another_config_is_refused(command, capsys):
  run, folder = command
  assert run('--recipes=bf16,fp8') == (0, ['bf16', 'fp8'])
  assert run('--recipes=bf16,fp8,fp32') == (0, ['fp32'])
  found = json.loads((folder / 'losses.json').read_text())
  assert found['losses'].keys() == {'bf16', 'fp8', 'fp32'}
  assert found.keys() > {'device', 'date', 'versions', 'config'}
  assert (folder / 'losses.png').stat().st_size > 1000
  capsys.readouterr()
  assert run(config='configs/precision_study.py:debug') == (2, [])
  assert 'holds a study of another config' in capsys.readouterr().err
  assert run('--recipes=fp7') == (2, [])
  assert "--recipes: 'fp7' must be one of fp32, bf16, fp8" in capsys.readouterr().err
