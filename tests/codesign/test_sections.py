"""The arithmetic behind the report's sections, against counting by hand and limits that must hold."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dsv3_jax import config, counts, flags
from dsv3_jax.codesign import (
  compute,
  decode_limit,
  expert_traffic,
  hardware,
  host,
  local,
  memory,
  models,
  what_if,
)
from dsv3_jax.parallel import skews
from dsv3_jax.parallel.trace import Trace

C, H800 = config.Config(), hardware.H800
V3 = models.V3


def test_models_of_the_tables_are_those_of_the_configs():
  path = pathlib.Path(__file__).parents[2] / 'configs'
  read = lambda name: config.freeze(flags.load(str(path / name))).model
  v2 = read('deepseek_v2_236b.py')
  assert counts.parameters(models.V2) == counts.parameters(v2) == 235_741_434_880
  assert dataclasses.replace(models.V2.moe, dispatch=v2.moe.dispatch) == v2.moe
  assert read('deepseek_v3_671b.py') == V3


# ---- memory and compute --------------------------------------------------------------------------


def test_caches_of_every_kind_hold_what_they_should():
  mla = memory.latent(V3)
  assert mla.token_bytes() == 576 * 2 * 61
  assert mla.token_bytes('fp8') == 656 * 61  # FlashMLA's row: 512 codes, 4 scales, 64 in BF16
  mha = memory.grouped('', 61, 128, 128).token_bytes()
  assert mha == 128 * memory.grouped('', 61, 1, 128).token_bytes() == 2 * 128 * 128 * 2 * 61
  window = dataclasses.replace(mla, window=100)
  assert window.stored(50) == mla.stored(50) and window.stored(1000) == mla.stored(100)
  sparse = dataclasses.replace(mla, selected=10, index=132)
  assert sparse.stored(1000) == 1000 * 61 * (1152 + 132)
  assert sparse.read(1000) == 61 * (10 * 1152 + 1000 * 132)
  assert mla.read(1000) == mla.stored(1000)
  with pytest.raises(ValueError, match='must be one of fp32, bf16, fp8, int4'):
    mla.token_bytes('fp6')


def test_training_memory_is_that_of_all_parameters_shared_out():
  one = config.Mesh()
  n = counts.parameters(V3) + counts.mtp_parameters(V3)
  state = memory.training_state(C, one, precision='bf16')
  assert state.weights == pytest.approx(2 * n) and state.gradients == pytest.approx(4 * n)
  assert state.master == pytest.approx((4 + 4) * n)
  routed = 59 * 256 * counts.expert_parameters(V3)
  split = memory.training_state(C, config.Mesh(node=8, local=8), precision='bf16')
  assert split.gradients == pytest.approx(4 * (n - routed + routed / 64))
  zero = memory.training_state(C, config.Mesh(data=4, node=8, local=8, zero=1), precision='bf16')
  assert zero.gradients == split.gradients
  assert zero.master == pytest.approx(8 * ((n - routed) / 256 + routed / 256))
  most = memory.training_state(C, config.Mesh(data=4, node=8, local=8, zero=3), precision='bf16')
  assert most.weights == pytest.approx(2 * n / 256)
  with pytest.raises(ValueError, match=r'mesh.node x mesh.local = 24: must divide'):
    memory.training_state(C, config.Mesh(node=8, local=3), precision='bf16')
  with pytest.raises(ValueError, match=r'mesh.pipe = 62: must be at most 61'):
    memory.training_state(C, config.Mesh(pipe=62), precision='bf16')


def test_more_recomputation_keeps_less():
  keep = lambda remat, precision='bf16': sum(
    memory.activations(dataclasses.replace(V3, remat=remat), precision=precision).values()
  )
  assert keep('block') < keep('latents', 'fp8') < keep('latents') < keep('none')
  assert keep('block') == 2 * 7168


def test_absorbed_decode_does_so_many_flops_for_a_byte_of_cache():
  assert compute.mla_intensity(V3) == pytest.approx(2 * 128 * (512 + 576) / 1152)
  assert compute.mla_intensity(V3, queries=2) == 2 * compute.mla_intensity(V3)
  assert compute.gqa_intensity(models.QWEN_72B) == 64 / 8
  assert compute.gqa_intensity(models.LLAMA_405B) == 128 / 8
  assert compute.roof(H800.chip, 10) == 10 * 3.35e12 and compute.roof(H800.chip, 1e4) == 989e12
  at = lambda context: compute.decode_flops(V3, context)
  assert at(0) == 2 * 36_624_596_992
  assert at(10) - at(0) == 10 * 61 * 128 * 2 * (576 + 512)


# ---- machines ------------------------------------------------------------------------------------


def test_unknown_hardware_lists_the_known():
  with pytest.raises(ValueError, match=r"'h80': unknown; there are h800, h100, .*mean h800\?"):
    hardware.get('h80')
  assert hardware.get('v5p').chip.bf16 == 459e12


def test_an_exchange_takes_the_slow_links_beyond_the_fast_ones_and_pays_hops_in_a_torus():
  assert H800.exchange(8).name == 'NVLink' and H800.exchange(9).name == 'InfiniBand'
  v5p = hardware.V5P
  # In a ring of four, a byte passes 0, 1, 2, 1 links: one on average, in each of three dimensions.
  assert v5p.exchange(64).nominal == pytest.approx(v5p.fast.nominal / 3)
  assert v5p.exchange(8).nominal == pytest.approx(v5p.fast.nominal / 1.5)
  assert decode_limit.unit(V3, H800) == 256 and decode_limit.unit(V3, hardware.GB200) == 72


# ---- expert traffic ------------------------------------------------------------------------------

SMALL = config.Moe(num_experts=16, top_k=4, num_groups=4, top_groups=2)


def test_traffic_is_what_walking_over_every_choice_counts():
  node, local, tokens = 4, 2, 13
  ids = skews.make('zipf', SMALL, node * local, tokens)
  slow, fast = dict.fromkeys(expert_traffic.FORMS, 0), dict.fromkeys(expert_traffic.FORMS, 0)
  for source, token, chosen in ((n, t, ids[n, t]) for n in range(8) for t in range(tokens)):
    del token
    here, devices = source // local, [int(e) // 2 for e in chosen]
    slow['one by one'] += sum(d // local != here for d in devices)
    fast['one by one'] += sum(d // local == here and d != source for d in devices)
    slow['flat'] += sum(d // local != here for d in set(devices))
    fast['flat'] += sum(d // local == here and d != source for d in set(devices))
    nodes = {d // local for d in devices}
    slow['two-hop'] += len(nodes - {here})
    fast['two-hop'] += sum(d % local != source % local for d in set(devices))
  for form in expert_traffic.FORMS:
    found = expert_traffic.count(form, ids, 16, node, local)
    assert found.slow == pytest.approx(slow[form] / (8 * tokens)), form
    assert found.fast == pytest.approx(fast[form] / (8 * tokens)), form
  with pytest.raises(ValueError, match='form'):
    expert_traffic.count('three-hop', ids, 16, node, local)


def test_rows_have_their_published_sizes():
  sizes = [expert_traffic.row_bytes(kind, 7168) for kind in ('bf16', 'fp8', 'logfmt10')]
  assert sizes == [14_336, 7_224, 9_184]
  with pytest.raises(ValueError, match='fp7'):
    expert_traffic.row_bytes('fp7', 7168)


def recorded(moe, tokens=64):
  ids = skews.make('uniform', moe, 1, 2 * tokens).reshape(2, tokens, -1).astype(np.uint16)
  sizes = {name: getattr(moe, name) for name in ('num_experts', 'num_groups', 'top_groups')}
  return Trace(ids, **sizes, rows=1, seq_len=tokens, model='run', step=3, config={})


def test_a_trace_is_replayed_and_one_of_another_router_refused():
  c = dataclasses.replace(C, model=dataclasses.replace(C.model, moe=SMALL))
  trace = recorded(SMALL)
  s = expert_traffic.section(c, H800, trace)
  ids = trace.ids_YTK[1].astype(int).reshape(16, 4, -1)
  want = expert_traffic.count('two-hop', ids, 16, 4, 4).slow
  assert s.row('MoE layer 1, two-hop').value == want
  with pytest.raises(ValueError, match='num_experts = 16; the config has 256'):
    expert_traffic.section(C, H800, trace)
  with pytest.raises(ValueError, match='has 8 tokens; 16 devices'):
    expert_traffic.section(c, H800, recorded(SMALL, 8))


def test_placing_by_load_evens_a_skewed_routing():
  s = expert_traffic.section(C, H800)
  assert s.row('zipf: anywhere').value < 1.05 < s.row('zipf: in order').value
  assert s.row('zipf: groups on nodes').value < s.row('zipf: in order').value
  assert s.row('uniform: nodes a token').value <= 4


# ---- local use, host, what if --------------------------------------------------------------------


def test_a_pc_is_bound_by_what_it_reads():
  assert local.dense_speed(1e9, hardware.AI_PC, weight=1.0) == pytest.approx(256)
  both = local.speed(V3, hardware.M3_ULTRA, hardware.M3_ULTRA)
  read = 0.5 * counts.active_parameters(V3, embedding=False)
  assert both == pytest.approx(819e9 / read)
  assert local.expert_weights(V3, 2) / local.expert_weights(V3) == pytest.approx(2 - 8 / 256)
  assert 20 < local.speed(V3, hardware.TWO_XEONS, hardware.RTX_4090) < 50
  with pytest.raises(ValueError, match=r'RTX 5090: 3\d\d GB of weights do not fit 32 GB'):
    local.speed(V3, hardware.RTX_5090, hardware.RTX_5090)


def test_a_shared_bus_is_halved_unless_experts_go_first():
  assert host.share(64.0, 50.0, priority=False) == host.Share(32.0, 32.0)
  assert host.share(64.0, 50.0, priority=True) == host.Share(50.0, 14.0)
  assert host.share(64.0, 10.0, priority=False) == host.Share(10.0, 54.0)
  assert host.share(64.0, 80.0, priority=True) == host.Share(64.0, 0.0)
  with pytest.raises(ValueError, match='bus = 0'):
    host.share(0.0, 1.0, priority=True)


def test_each_switch_is_worth_what_its_assumption_says():
  start = what_if.setting(C, H800)
  after = {s.name: s.change(start, C, H800) for s in what_if.SWITCHES}
  decode = lambda name: what_if.decode_seconds(C, after[name]) / what_if.decode_seconds(C, start)
  step = lambda s: what_if.step_seconds(C, H800, s)[0]
  assert decode('LogFMT in the NIC') == pytest.approx((1 + 9184 / 7168) / 3)
  assert decode('one network for scale-up and scale-out') == pytest.approx(50 / 200)
  assert decode('multicast and reduction in the network') == pytest.approx((1 + 9 * 2) / 27)
  assert decode('ordered multi-plane NICs') == 1
  today = step(start)
  assert today == pytest.approx(19.926)
  faster = today * (1 - 13.95 / 19.926 * 20 / 132)
  assert step(after['exchange without SMs']) == pytest.approx(faster)
  # Where links are slow, the exchange is what the step waits for, and then they count.
  slow = dataclasses.replace(start, bandwidth=start.bandwidth / 10)
  shorter = dataclasses.replace(slow, combine=1.0)
  assert step(shorter) < step(slow) and step(slow) > today
