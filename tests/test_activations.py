"""The program that records activations: what it writes is what the FFNs of a forward pass add."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import shell

from dsv3_jax import activations as program
from dsv3_jax import mesh
from dsv3_jax.codesign import branches
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import Transformer

pytestmark = pytest.mark.xdist_group('programs')


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> shell.Programs:
  return shell.programs(tmp_path_factory.getbasetemp())


def test_branches_add_up_to_the_hidden_states_where_attention_adds_nothing():
  c = parity.small({'model.num_layers': 4, 'model.num_dense_layers': 2}).model
  model = Transformer(c, jax.random.key(0))
  silent = lambda path, x: jnp.zeros_like(x) if 'attn' in mesh.path_names(path) else x
  model = jax.tree_util.tree_map_with_path(silent, model)
  tokens_BL = np.random.default_rng(0).integers(0, c.vocab_size, (2, 32), np.int32)
  found_YBLD = program.make_branches(c, mesh.make_mesh(parity.small().mesh))(model, tokens_BL)
  assert found_YBLD.shape == (4, 2, 32, c.dim) and (jnp.abs(found_YBLD).max((1, 2, 3)) > 0).all()
  hidden_BLD = parity.on_one_device(lambda m, x: m.hidden(c, m.embed(c, x))[0])(model, tokens_BL)
  total_BLD = model.embed(c, tokens_BL) + found_YBLD.sum(0)
  expected_BLD = rms_norm(total_BLD, model.final_norm_D[...], c.norm_eps)
  parity.assert_close(hidden_BLD, expected_BLD)


def test_a_run_s_branches_are_recorded_and_read_again(programs, capsys, tmp_path):
  out = tmp_path / 'activations.npz'
  assert program.main([f'--out={out}', '--tokens=70', str(programs.finished[0])]) == 0
  found = branches.load(out)
  assert found.values_YTD.shape == (3, 70, 32) and found.step == 36
  assert capsys.readouterr().out.startswith('checkpoint 36: 70 tokens in 3 layers, rms ')
  assert program.main([f'--out={tmp_path}', str(programs.finished[0])]) == 2
  told = f'activations: --out={tmp_path}: is a folder; wants a file\n'
  assert capsys.readouterr().err == told


def test_a_file_that_is_none_is_told_in_one_line(tmp_path):
  path = tmp_path / 'a.npz'
  with pytest.raises(ValueError, match=r'a\.npz: cannot be read: No such file'):
    branches.load(path)
  path.write_bytes(b'PK\x03\x04 and no more')
  with pytest.raises(ValueError, match=r'a\.npz: is no file of dsv3_jax.activations: '):
    branches.load(path)
  np.savez(path, values=np.zeros((1, 2, 3), np.float32), about=np.array('{"version": 7}'))
  with pytest.raises(ValueError, match='is of version 7: this program reads version 1'):
    branches.load(path)
  with pytest.raises(ValueError, match=r'values are float64 \[3\]: must be float32 \[layers, tok'):
    branches.Branches(np.zeros(3), 'a', None)
  with pytest.raises(ValueError, match='values: 1 of them are not finite'):
    branches.Branches(np.full((1, 1, 1), np.nan, np.float32), 'a', None)
