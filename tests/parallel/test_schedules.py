"""Pipeline schedules: every formula of the table, every invariant, every bad size."""

import itertools

import numpy as np
import pytest

from dsv3_jax.parallel.pipeline import __main__ as program
from dsv3_jax.parallel.pipeline import bench, schedules, simulate, uniform
from dsv3_jax.parallel.pipeline.simulate import Costs

_STAGES = (2, 4, 6, 8, 10, 16)
_NAMES = tuple(schedules.SCHEDULES)


def _sizes():
  return [(pp, micro) for pp in _STAGES for micro in (2 * pp, 2 * pp + 2, 5 * pp)]


@pytest.mark.parametrize('name', _NAMES)
def test_bubble_equals_its_formula_where_all_three_parts_take_as_long(name):
  for (stages, micro), overlap in itertools.product(_sizes(), (2.4, 3.0)):
    costs = Costs(overlap=overlap)
    if name == 'dualpipe_v' and overlap != 3.0:
      continue  # twice as many pairs on a rank: the formula counts those of one
    got = simulate.simulate(schedules.make(name, stages, micro), costs).bubble
    np.testing.assert_allclose(got, simulate.formula(name, stages, costs), err_msg=f'{stages}')


def test_bubble_of_dualpipe_is_at_most_its_formula_where_parts_differ():
  costs = Costs(forward=1.0, input=1.3, weight=0.7, overlap=2.6)
  for stages, micro in _sizes():
    bubble = simulate.simulate(schedules.make('dualpipe', stages, micro), costs).bubble
    assert bubble <= simulate.formula('dualpipe', stages, costs) + 1e-9


@pytest.mark.parametrize(
  'name, held', [('1f1b', 0), ('zb1p', 0), ('dualpipe', 1), ('dualpipe_v', 1)]
)
def test_activations_are_those_of_the_table(name, held):
  for stages, micro in _sizes():
    schedule = schedules.make(name, stages, micro)
    assert max(simulate.simulate(schedule).live) == stages + held


def test_dualpipe_takes_the_steps_that_the_published_order_takes():
  """Steps of ranks 0 to 3 of 8 with 20 micro-batches, counted from the published description."""
  steps = ([6, 1, 3, 3, 3, 1, 3, 1], [4, 2, 2, 4, 2, 2, 2, 2])
  steps += ([2, 3, 1, 5, 1, 3, 1, 3], [0, 4, 0, 6, 0, 4, 0, 4])
  unit = [['F'], ['F', 'F'], ['I', 'W', 'F'], ['FB', 'FB'], ['B', 'FB']]
  schedule = schedules.make('dualpipe', 8, 20)
  for r, counts in enumerate(steps):
    expected = [kind for u, n in zip(unit, counts, strict=False) for kind in u * n]
    if r == 3:
      at = sum(len(u) * n for u, n in zip(unit[:3], counts, strict=False))
      expected[at : at + 1] = ['F', 'B']  # the very first pair of a rank in the middle
    half = counts[5]
    expected += ['B'] * half + ['I'] * half + ['W', 'I'] * counts[6] + ['W'] * counts[7]
    for rank in (r, 7 - r):
      assert [op.kind for op in schedule.ranks[rank]] == expected
  mirrored = [[item and 1 - item.route for item in op] for op in schedule.ranks[7]]
  assert mirrored == [[item and item.route for item in op] for op in schedule.ranks[0]]


def test_transfers_delay_what_crosses_ranks_alone():
  costs = Costs(transfer=0.25)
  there = simulate.simulate(schedules.make('gpipe', 4, 8), costs).ranks
  assert there[3][0].start == 3 * (1 + 0.25)
  folded = simulate.simulate(schedules.make('dualpipe_v', 4, 8), costs).ranks
  turn = [span for span in folded[1] if span.op.forward and span.op.forward.micro == 0]
  assert turn[0].start == 1.25 and turn[0].op.forward.stage == 1


def test_a_schedule_that_stands_still_or_leaves_something_out_is_refused():
  good = schedules.make('1f1b', 2, 4)
  first, second = good.ranks
  waits = schedules.dataclasses.replace(good, ranks=(first[::-1], second))
  with pytest.raises(ValueError, match=r'1f1b: deadlock; rank 0 waits to start'):
    simulate.simulate(waits)
  for broken, told in (
    (first[:-1], 'missing'),
    (first + first[:1], 'twice'),
    (second, 'stage is not'),
  ):
    with pytest.raises(ValueError, match=told):
      simulate.simulate(schedules.dataclasses.replace(good, ranks=(broken, second)))


# ---- the one that a single program runs ----------------------------------------------------------


def test_uniform_ticks_equal_their_closed_form_and_are_a_schedule():
  for stages, micro in _sizes():
    costs = Costs(forward=1.1, input=0.9, weight=0.7, overlap=2.3)
    assert uniform.makespan(stages, micro, costs) == pytest.approx(
      uniform.formula(stages, micro, costs)
    )
    assert uniform.makespan(stages, micro) - 3 * micro == 2.5 * stages - 5
    simulate.simulate(uniform.as_schedule(stages, micro))
    assert uniform.makespan(stages, micro, costs, deferred=False) == pytest.approx(
      uniform.formula(stages, micro, costs, deferred=False)
    )
    assert uniform.makespan(stages, micro, deferred=False) - 3 * micro == 3 * stages - 6


def test_uniform_waits_for_other_ranks_results_until_the_tick_after():
  for stages, micro in ((2, 4), (4, 10), (8, 20)):
    ticks = uniform.ticks(stages, micro)
    done = {}
    for k, tick in enumerate(ticks):
      for op in filter(None, tick.ops):
        for need in simulate._needs(uniform.as_schedule(stages, micro), op):
          assert done[need] < k, (tick.kind, op)
      for op in filter(None, tick.ops):
        done |= dict.fromkeys(simulate._results(op), k)


@pytest.mark.parametrize('deferred', [True, False])
@pytest.mark.parametrize('stages, micro', [(2, 4), (4, 8), (4, 14), (8, 20), (16, 32)])
def test_every_value_is_still_in_its_slot_when_it_is_read(stages, micro, deferred):
  """Plays the tables: what is read must be what was put there for it; nothing is overwritten before."""
  t = uniform.tables(stages, micro, deferred=deferred)
  assert t.kept <= stages + 1 and t.deferred == (stages // 2 + 1 if deferred else 0)
  kept, inputs, gradients, ctx = ({} for _ in range(4))
  for k, kind in enumerate(t.kinds):
    col = {name: x[k] for name, x in t.columns.items()}
    item = lambda part, r, col=col: tuple(int(col[f'{part}_{f}'][r]) for f in ('route', 'micro'))
    sent = {'f': [None] * stages, 'b': [None] * stages}
    for r in range(stages):
      if col['b_on'][r]:
        d, m = item('b', r)
        assert kept[r, col['b_slot'][r]] == ('F', d, m)
        if r != (0 if d else stages - 1):
          assert gradients[r, col['b_from'][r]] == (d, m)
        sent['b'][r] = (d, m)
        if kind == 'I':
          ctx[r, col['b_ctx'][r]] = (d, m)
        else:
          del kept[r, col['b_slot'][r]]
      if col['w_on'][r]:
        assert ctx[r, col['w_ctx'][r]] == item('w', r)
        assert kept.pop((r, col['w_slot'][r])) == ('F', *item('w', r))
    for r in range(stages):
      if col['f_on'][r]:
        d, m = item('f', r)
        if r != (stages - 1 if d else 0):
          assert inputs[r, col['f_from'][r]] == (d, m)
        assert (r, col['f_slot'][r]) not in kept
        kept[r, col['f_slot'][r]] = ('F', d, m)
        sent['f'][r] = (d, m)
    for part, buffer, size in (('f', inputs, t.inputs), ('b', gradients, t.gradients)):
      for r, by in itertools.product(range(stages), (1, -1)):
        slot = int(col[f'{part}_to_{"right" if by == 1 else "left"}'][r])
        if slot < size:
          buffer[r, slot] = sent[part][r - by]
  assert not kept


# ---- sizes that cannot work ----------------------------------------------------------------------


@pytest.mark.parametrize(
  'name, stages, micro, told',
  [
    ('dualpipe', 5, 20, '5 stages: dualpipe wants an even number of stages; 4 or 6 would work'),
    ('dualpipe', 8, 14, '14 micro-batches over 8 stages: .* even number, at least 16; 16 would'),
    ('dualpipe', 8, 17, '17 micro-batches over 8 stages: .* 18 would work'),
    ('1f1b', 8, 4, '4 micro-batches over 8 stages: 1f1b wants at least 8; 8 would work'),
    ('1f1b', 1, 4, '1 stages: 1f1b wants two stages or more; 2 would work'),
    ('two_f', 8, 16, "schedule 'two_f': unknown; there are gpipe, 1f1b"),
  ],
)
def test_sizes_without_an_order_say_what_would_work(name, stages, micro, told):
  with pytest.raises(ValueError, match=told):
    schedules.make(name, stages, micro)


def test_program_prints_the_table_and_draws(tmp_path, capsys):
  out = tmp_path / 'gantt.png'
  assert program.main(['show', 'dualpipe', '--stages=4', f'--out={out}']) == 0
  text = capsys.readouterr().out
  assert 'dualpipe       38.00     2.00     2.00            5' in text
  assert 'uniform        41.00     5.00     5.00' in text
  assert 'rank 1: F0.0 F1.0' in text and out.read_bytes()[:4] == b'\x89PNG'
  assert program.main(['show', 'dualpipe', '--stages=5']) == 2
  assert '4 or 6 would work' in capsys.readouterr().err


# ---- on a real clock -----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['dualpipe', 'zb1p', 'gpipe', 'dualpipe_v'])
def test_ranks_that_are_threads_get_all_messages_and_take_no_less_than_simulated(name):
  schedule = schedules.make(name, 4, 8)
  assert bench.measure(schedule, Costs(), 1e-3) >= simulate.simulate(schedule).makespan
  with pytest.raises(ValueError, match=r'transfer = 0\.5: must be 0'):
    bench.measure(schedule, Costs(transfer=0.5), 1e-3)


def test_program_prints_measured_beside_simulated(capsys):
  sizes = ['--stages', '2', '--unit_ms=1']
  assert program.main(['bench', '--schedules=1f1b,dualpipe', *sizes]) == 0
  head, *rows = capsys.readouterr().out.splitlines()
  assert head.split()[:5] == ['schedule', 'stages', 'micro', 'simulated', 'measured']
  assert [row.split()[:4] for row in rows] == [
    ['1f1b', '2', '8', '27.00'],
    ['dualpipe', '2', '8', '24.00'],
  ]
  assert program.main(['bench', '--schedules=two_f', *sizes]) == 2
  assert "schedule 'two_f': unknown" in capsys.readouterr().err
