"""Mutated headers and indexes: an error of ours, or exactly what the safetensors package reads.

Each case breaks a good file in one to three places: bytes turned over, pieces cut out or doubled, the
length changed, or a value in the JSON replaced, removed, doubled, renamed or counted up. `_ROUNDS` times
`_CASES` of each kind run, all with fixed seeds; a failure prints the bytes.
"""

import copy
import json
import pathlib
import random
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dsv3_jax.weights import headers, shards
from dsv3_jax.weights.shards import FormatError

_ROUNDS, _CASES = 8, 250

_VALUES = [
  *(None, True, False, 0, 1, -1, -0.0, 1.0, 4.5, 2**31, 2**53 + 1, 2**63, 2**64, 10**40, 1e999),
  *('', 'U8', 'F32', 'F4', 'BF17', 'a', '__metadata__', '\ud800', 'é', '\0', 'x' * 5000),
  *([], {}, [0], [1, 2], [[]], [4, 0], [0, 4], [True, 4], {'dtype': 'U8'}),
]
_FILES = [
  *('../outside.safetensors', './one.safetensors', '/etc/passwd', 'one.safetensors/', 'missing'),
  *('one.safetensors', 'two.safetensors', 'pipe.safetensors', 'pickle.bin', '.', '..', ''),
  *('sub/one.safetensors', 'ONE.SAFETENSORS', 'one.safetensors\0', '~/one.safetensors'),
]
_SNIPPETS = [
  b'"',
  b'{',
  b'}',
  b'[',
  b']',
  b',',
  b':',
  b'-',
  b'.0',
  b'e1',
  b'9' * 30,
  b'NaN',
  b'\xff',
]


def _tensors(names, seed=0):
  rng = np.random.default_rng(seed)
  dtypes = [np.uint8, np.float32, np.int16, np.bool_, np.float64, np.int8]
  arrays = {}
  for i, name in enumerate(names):
    shape = tuple(rng.integers(0, 4, i % 4).tolist())
    arrays[name] = rng.integers(0, 2, shape).astype(dtypes[i % len(dtypes)])
  return arrays


# ---- mutations -----------------------------------------------------------------------------------


def _mutated_bytes(rng, text):
  """Some bytes of `text` turned over, removed, doubled, or replaced by a piece of JSON."""
  text = bytearray(text)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice([1, 1, 2, 9, 60]))
    match rng.randrange(5):
      case 0 if at < len(text):
        text[at] ^= 1 << rng.randrange(8)
      case 1:
        del text[at:end]
      case 2:
        text[at:at] = text[at:end]
      case 3:
        text[at:at] = rng.choice(_SNIPPETS)
      case _:
        text[at:end] = rng.randbytes(end - at)
  return bytes(text)


def _mutated_json(rng, value, others):
  """JSON text of `value` after one to three changes somewhere in it."""
  value = json.loads(json.dumps(value))
  for _ in range(rng.randint(1, 3)):
    at, places = value, []
    while isinstance(at, dict | list) and at:
      key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
      places.append((at, key))
      at = at[key]
    if not places:
      break
    at, key = rng.choice(places)
    match rng.randrange(6):
      case 0 | 1:
        at[key] = copy.deepcopy(rng.choice(others))
      case 2:
        del at[key]
      case 3 if type(at[key]) is int:
        at[key] += rng.choice([-1, 1, 1, 4, 2**32, -(2**32)])
      case 4 if isinstance(at, dict):
        at[str(rng.choice([*at, 'new', '\ud800', '__metadata__', 'shape']))] = at.pop(key)
      case 5 if isinstance(at, dict):
        at[str(rng.choice([*at, 'new', '__metadata__']))] = at[key]
      case _ if isinstance(at, list):
        at.insert(key, copy.deepcopy(rng.choice([at[key], *others])))
  text = json.dumps(value)
  if rng.random() < 0.2:  # a key twice, which no dict holds
    keys = [part for part in text.split('"')[1::2] if part]
    text = text.replace(f'"{rng.choice(keys or ["x"])}"', f'"{rng.choice(keys or ["y"])}"', 1)
  return text.encode('utf-8', 'surrogatepass')


def _mutated_file(rng, content):
  length = int.from_bytes(content[:8], 'little')
  header, data = content[8 : 8 + length], content[8 + length :]
  kind = rng.randrange(4)
  if kind == 0:
    return _mutated_bytes(rng, content)
  if kind == 1:
    header = _mutated_bytes(rng, header)
  else:
    header = _mutated_json(rng, json.loads(header), _VALUES)
  if rng.random() < 0.2:
    data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.randint(0, 3))
  length = len(header) + (rng.choice([-9, -1, 1, 8, 2**20, 2**63]) if rng.random() < 0.1 else 0)
  return max(length, 0).to_bytes(8, 'little') + header + data


# ---- what must hold ------------------------------------------------------------------------------


def _assert_same_as_the_package(folder, paths):
  """`folder` holds the tensors that the package reads from the files at `paths`, and no others."""
  theirs = {}
  for path in paths:
    theirs |= {name: (path, x) for name, x in safetensors.deserialize(path.read_bytes())}
  assert folder.tensors.keys() == theirs.keys()
  for name, (path, x) in theirs.items():
    t = folder.tensors[name]
    assert (t.path, t.dtype, t.shape) == (path, headers.DTYPES[x['dtype']], tuple(x['shape']))
    try:
      ours = folder.read(name)
    except FormatError as error:
      assert 'other than 0 and 1' in str(error)
      assert t.dtype == np.bool_ and max(x['data']) > 1
      continue
    assert (ours.dtype, ours.shape, ours.tobytes()) == (t.dtype, t.shape, bytes(x['data']))


def _read(folder, content):
  """What `Folder` makes of a folder: itself, or None for a FormatError of one short line."""
  begun = time.monotonic()
  try:
    return shards.Folder(folder)
  except FormatError as error:
    assert '\n' not in str(error) and len(str(error)) < 900, content
  except Exception as error:
    pytest.fail(f'{error!r} for {content!r}')
  finally:
    assert time.monotonic() - begun < 5, content
  return None


@pytest.fixture
def _little_memory():
  """Fails a test that has held more than 16 MB at once: no file here has more than some kB."""
  tracemalloc.start()
  yield
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 16 * 2**20


@pytest.mark.parametrize('seed', range(_ROUNDS))
@pytest.mark.usefixtures('_little_memory')
def test_a_mutated_header_is_an_error_or_what_the_package_reads(tmp_path, seed):
  rng = random.Random(seed)
  good = safetensors.numpy.save(_tensors('abcdefg'[: seed + 1], seed), {'format': 'pt'})
  path = tmp_path / shards.SINGLE
  accepted = 0
  for _ in range(_CASES):
    content = _mutated_file(rng, good)
    path.write_bytes(content)
    folder = _read(tmp_path, content)
    if folder is not None:
      accepted += 1
      try:
        _assert_same_as_the_package(folder, [path])
      except Exception as error:
        pytest.fail(f'{error!r} for {content!r}')
  assert 0 < accepted < _CASES / 2  # both sides of the door are met


def _make_folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Two shards and an index; beside and above it, files that an index must not lead to."""
  folder = tmp_path / 'folder'
  (folder / 'sub').mkdir(parents=True)
  one, two = _tensors('abc', 1), _tensors('defgh', 2)
  for path, arrays in [
    (folder / 'one.safetensors', one),
    (folder / 'two.safetensors', two),
    (folder / 'sub' / 'one.safetensors', one),
    (tmp_path / 'outside.safetensors', one),
  ]:
    safetensors.numpy.save_file(arrays, path)
  (folder / 'pipe.safetensors').symlink_to('/dev/zero')
  (folder / 'pickle.bin').write_bytes(b'\x80\x04.')
  return folder


@pytest.mark.parametrize('seed', range(_ROUNDS))
@pytest.mark.usefixtures('_little_memory')
def test_a_mutated_index_is_an_error_or_names_what_the_package_reads(tmp_path, seed):
  rng = random.Random(seed)
  folder = _make_folder(tmp_path)
  places = {c: 'one.safetensors' for c in 'abc'} | {c: 'two.safetensors' for c in 'defgh'}
  good = {'metadata': {'total_size': 123}, 'weight_map': places}
  accepted = 0
  for _ in range(_CASES):
    match rng.randrange(6):
      case 0 | 1:
        text = _mutated_bytes(rng, json.dumps(good).encode())
      case 2:  # all tensors of a shard go elsewhere
        elsewhere = json.dumps(rng.choice(_FILES))
        text = json.dumps(good).replace('"one.safetensors"', elsewhere).encode()
      case _:
        text = _mutated_json(rng, good, _VALUES + _FILES * 3)
    (folder / shards.INDEX).write_bytes(text)
    found = _read(folder, text)
    if found is not None:
      accepted += 1
      named = json.loads(text)['weight_map']
      try:
        _assert_same_as_the_package(found, sorted({folder / file for file in named.values()}))
        assert {name: t.path.name for name, t in found.tensors.items()} == named
      except Exception as error:
        pytest.fail(f'{error!r} for {text!r}')
  assert 0 < accepted < _CASES / 2


@pytest.mark.parametrize('seed', range(_ROUNDS))
def test_a_shard_cut_anywhere_is_an_error(tmp_path, seed):
  folder = _make_folder(tmp_path)
  places = {c: 'one.safetensors' for c in 'abc'} | {c: 'two.safetensors' for c in 'defgh'}
  (folder / shards.INDEX).write_text(json.dumps({'weight_map': places}))
  assert _read(folder, b'').tensors.keys() == places.keys()
  whole = (folder / 'two.safetensors').read_bytes()
  for end in range(seed, len(whole), _ROUNDS):
    (folder / 'two.safetensors').write_bytes(whole[:end])
    assert _read(folder, end) is None, end
