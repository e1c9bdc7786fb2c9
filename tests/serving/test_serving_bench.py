"""Clients of OpenAI's package at once, and that an answer unlike the one that came alone is told."""

import json

import pytest

from dsv3_jax.serving import bench

pytest.importorskip('openai')


def test_clients_at_once_get_the_answers_that_came_alone(folder, capfd):
  arguments = '--clients=6', '--requests=2', '--max_tokens=12', '--words=5', '--slots=4'
  assert bench.main([str(folder), *arguments]) == 0
  figures = json.loads(capfd.readouterr().out)
  assert (figures['answers'], figures['not_as_alone']) == (12, 0)
  for name in ('first_token', 'token'):
    assert 0 < figures[name]['p50_ms'] <= figures[name]['p99_ms']


def test_another_answer_is_told(folder, capfd, monkeypatch):
  real, told = bench._ask, []

  async def ask(client, prompt, max_tokens):
    answer = await real(client, prompt, max_tokens - len(told) // 3)  # shorter, once all came alone
    told.append(answer)
    return answer

  monkeypatch.setattr(bench, '_ask', ask)
  arguments = '--clients=3', '--requests=1', '--max_tokens=6', '--words=5', '--slots=4'
  assert bench.main([str(folder), *arguments]) == 1
  assert json.loads(capfd.readouterr().out)['not_as_alone'] == 3
