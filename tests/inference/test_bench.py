"""What the benchmarks compare gives the same; what they compute of acceptance is what chance gives."""

import numpy as np
import pytest

from dsv3_jax.inference import acceptance, bench, expanded


def test_the_expanded_cache_decodes_what_the_latent_one_does(v3):
  c, longest = v3.config.model, 40
  rng = np.random.default_rng(0)
  latent = bench.latent_step(v3.decoder, longest, c.vocab_size)
  each = bench.expanded_step(c, v3.device_mesh, v3.model)
  caches = [v3.decoder.empty(1), expanded.empty(c, 1, longest)]
  for position in range(longest):
    token = rng.integers(0, c.vocab_size, (1, 1)).astype(np.int32)
    at = np.full((1, 1), position, np.int32)
    ours, logprob, caches[0] = latent(token, at, caches[0])
    theirs, logits_BV, caches[1] = each(token, at, caches[1])
    logits_V = np.asarray(logits_BV, np.float64)[0]
    assert int(ours[0]) == int(theirs[0])
    best = logits_V.max() - np.log(np.exp(logits_V).sum())
    assert float(logprob[0]) == pytest.approx(best, abs=1e-4)
  assert sum(x.nbytes for pair in caches[1] for x in pair) == longest * expanded.bytes_per_token(c)


def test_acceptance_by_shared_noise_is_what_drawing_gives():
  rng = np.random.default_rng(0)
  for cut in (0, 3):
    p_V, q_V = rng.dirichlet(np.full(12, 0.5), 2)
    if cut:  # tokens that only one of them can choose
      p_V[:cut], q_V[-cut:] = 0, 0
      p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    noise_SV = rng.gumbel(size=(200_000, 12))
    with np.errstate(divide='ignore'):
      same = (np.log(p_V) + noise_SV).argmax(1) == (np.log(q_V) + noise_SV).argmax(1)
    shared, most = acceptance.shared_noise(p_V, q_V), acceptance.rejection(p_V, q_V)
    assert shared == pytest.approx(same.mean(), abs=0.005)
    assert most / (2 - most) - 1e-9 <= shared <= most  # (1 - d) / (1 + d), and the most there is


def test_equal_distributions_are_always_accepted_and_disjoint_ones_never():
  p_V = np.array([0.25, 0.75, 0, 0])
  assert acceptance.rejection(p_V, p_V) == acceptance.shared_noise(p_V, p_V) == 1
  assert acceptance.rejection(p_V, p_V[::-1]) == acceptance.shared_noise(p_V, p_V[::-1]) == 0


def test_what_cannot_be_measured_is_one_line(capsys):
  assert bench.main(['context', '--turns=0']) == 2
  assert capsys.readouterr().err == 'bench: --turns=0: must be at least 1\n'
