"""Files and folders that are not what they should be: one line that names the fault, nothing read."""

import json
import os
import pickle

import numpy as np
import pytest

from dsv3_jax.weights import headers, shards
from dsv3_jax.weights.shards import FormatError


def _write(folder, arrays, shard_bytes=10**9):
  specs = [(name, x.dtype, x.shape) for name, x in arrays.items()]
  writer = shards.Writer(folder, specs, shard_bytes, {'format': 'pt'})
  for shard in writer.shards():
    writer.write_shard(shard, arrays.__getitem__)
  writer.finish()


def _file(header, data=b'', length=None):
  """Bytes of a file with this header, a value or the text itself."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def _entry(dtype='U8', shape=(4,), offsets=(0, 4)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


# ---- malformed files -----------------------------------------------------------------------------

_GOOD = _file({'a': _entry()}, b'1234')

_BAD_FILES = {
  'empty': (b'', 'too short'),
  'shorter than the length': (b'\x01\0\0\0', 'too short'),
  'cut in the header': (_GOOD[:20], 'truncated'),
  'cut in the data': (_GOOD[:-1], 'truncated'),
  'data behind the last tensor': (_GOOD + b'5', 'belongs to no tensor'),
  'header length too large': (_file({'a': _entry()}, b'1234', length=2**40), 'only'),
  'header length of 64 bits': (_file({'a': _entry()}, b'1234', length=2**64 - 1), 'only'),
  'header length too small': (_file({'a': _entry()}, b'1234', length=20), 'cannot be read as JSON'),
  'header length zero': (_file({'a': _entry()}, b'1234', length=0), 'no JSON object'),
  'not JSON': (_file(b'{"a": }'), 'cannot be read as JSON'),
  'a list': (_file(b'[]'), 'no JSON object'),
  'white space first': (_file(b' {}'), 'no JSON object'),
  'not UTF-8': (_file(b'{"\xff": 1}'), 'cannot be read as JSON'),
  'half a surrogate pair': (_file(b'{"\\ud800": 1}'), 'cannot be read as JSON'),
  'nested deep': (_file(b'{"a":' + b'[' * 200_000), 'nested too deep'),
  'two objects': (_file(b'{}{}'), 'cannot be read as JSON'),
  'a tensor twice': (
    _file(
      b'{"a":' + json.dumps(_entry()).encode() + b',"a":' + json.dumps(_entry()).encode() + b'}'
    ),
    "key 'a' appears twice",
  ),
  'a dtype twice': (_file(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "key 'dtype' appears twice"),
  'metadata of numbers': (_file({'__metadata__': {'x': 1}}), '__metadata__'),
  'metadata is text': (_file({'__metadata__': 'x'}), '__metadata__'),
  'entry is a number': (_file({'a': 1}), 'must have dtype, shape and data_offsets'),
  'entry lacks shape': (_file({'a': {'dtype': 'U8', 'data_offsets': [0, 4]}}), 'must have dtype'),
  'entry has more': (_file({'a': _entry() | {'x': 1}}, b'1234'), 'must have dtype'),
  'unknown dtype': (_file({'a': _entry('F5')}, b'1234'), "dtype 'F5' is not known"),
  'dtype is a list': (_file({'a': _entry(['U8'])}, b'1234'), 'is not known'),
  'dtype of half bytes': (_file({'a': _entry('F4', [8])}, b'1234'), "dtype 'F4' is not known"),
  'negative shape': (_file({'a': _entry(shape=[-2, -2])}, b'1234'), 'holds the number'),
  'minus zero': (_file(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "'-0'"),
  'boolean shape': (_file({'a': _entry(shape=[True, 4])}, b'1234'), 'list of whole numbers'),
  'float shape': (_file({'a': _entry(shape=[4.0])}, b'1234'), 'must be a whole one'),
  'shape is text': (_file({'a': _entry(shape='4')}, b'1234'), 'list of whole numbers'),
  'shape of 100 digits': (_file({'a': _entry(shape=[10**100])}, b'1234'), 'holds the number'),
  'shape of 10000 digits': (
    _file(b'{"a":{"dtype":"U8","shape":[' + b'9' * 10_000 + b'],"data_offsets":[0,4]}}', b'1234'),
    'holds the number',
  ),
  'huge shape of no bytes': (
    _file({'a': _entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    'larger than any array',
  ),
  'shape that overflows 64 bits': (
    _file({'a': _entry(shape=[2**32, 2**32 + 1], offsets=[0, 2**32])}),
    'larger than any array',
  ),
  'too many dimensions': (_file({'a': _entry(shape=[1] * 33, offsets=[0, 1])}, b'1'), '33 dimen'),
  'not a number': (_file(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}'), "'NaN'"),
  'size that does not match': (_file({'a': _entry(shape=[5])}, b'1234'), 'takes 5 bytes'),
  'offsets backwards': (_file({'a': _entry(shape=[0], offsets=[4, 0])}, b'1234'), 'takes 0 bytes'),
  'offsets are three': (_file({'a': _entry(offsets=[0, 2, 4])}, b'1234'), 'two whole numbers'),
  'offsets out of range': (_file({'a': _entry(offsets=[4, 8])}, b'1234'), 'leaves a gap'),
  'offset of a terabyte': (_file({'a': _entry(shape=[2**40], offsets=[0, 2**40])}), 'truncated'),
  'overlap': (
    _file({'a': _entry(), 'b': _entry(offsets=[2, 6])}, b'123456'),
    "tensor 'b' at byte 2 of the data overlaps 'a', which ends at 4",
  ),
  'same bytes twice': (_file({'a': _entry(), 'b': _entry()}, b'1234'), 'overlaps'),
  'gap': (
    _file({'a': _entry(), 'b': _entry(offsets=[5, 9])}, b'123456789'),
    'leaves a gap behind',
  ),
}


@pytest.mark.parametrize('case', _BAD_FILES)
def test_a_malformed_file_is_refused_with_one_line_that_names_it(tmp_path, case):
  content, why = _BAD_FILES[case]
  (tmp_path / shards.SINGLE).write_bytes(content)
  with pytest.raises(FormatError) as error:
    shards.Folder(tmp_path)
  message = str(error.value)
  assert str(tmp_path / shards.SINGLE) in message and why in message, message
  assert '\n' not in message and len(message) < len(str(tmp_path)) + 350


def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tmp_path):
  with open(tmp_path / shards.SINGLE, 'wb') as file:
    file.write((2**36).to_bytes(8, 'little'))
    file.truncate(2**37)  # a hole: no byte of it is on the disk
  with pytest.raises(FormatError, match=f'at most {headers.MAX_HEADER} are read'):
    shards.Folder(tmp_path)


def test_a_file_that_has_become_shorter_is_found_when_it_is_read(tmp_path):
  _write(tmp_path / 'a', {'x': np.ones(12, np.float32)})
  folder = shards.Folder(tmp_path / 'a')
  path = tmp_path / 'a' / shards.SINGLE
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(FormatError, match='4 too early; it is truncated'):
    folder.read('x')


def test_booleans_other_than_0_and_1_are_refused(tmp_path):
  (tmp_path / shards.SINGLE).write_bytes(_file({'a': _entry('BOOL')}, b'\0\1\2\0'))
  with pytest.raises(FormatError, match='other than 0 and 1'):
    shards.Folder(tmp_path).read('a')


# ---- malformed folders ---------------------------------------------------------------------------


def _two_shards(folder):
  """A folder of two shards with tensors a, b and c, and its index."""
  _write(folder, {name: np.arange(4, dtype=np.uint8) for name in 'abc'}, 8)
  return json.loads((folder / shards.INDEX).read_text())


_ONE, _TWO = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))


def _index_fault(change):
  """A change of weight_map, as a change of the folder."""

  def apply(folder, index):
    change(index['weight_map'])
    (folder / shards.INDEX).write_text(json.dumps(index))

  return apply


def _rewrite(text):
  return lambda folder, index: (folder / shards.INDEX).write_text(text)


_BAD_FOLDERS = {
  'index names a missing file': (
    lambda f, _: (f / _TWO).unlink(),
    'cannot be opened: No such file',
  ),
  'index names a missing tensor': (_index_fault(lambda m: m.update(d=_ONE)), "lacks tensor 'd'"),
  'index lacks a tensor': (_index_fault(lambda m: m.pop('a')), "'a', which .* places nowhere"),
  'index has the wrong file': (_index_fault(lambda m: m.update(b=_TWO)), f"places in '{_TWO}'"),
  'a tensor in two shards': (
    lambda f, _: (f / _TWO).write_bytes((f / _ONE).read_bytes()),
    "tensor 'a' stands in .*00001.* and in .*00002",
  ),
  'a shard in a folder above': (_index_fault(lambda m: m.update(c=f'../{_TWO}')), 'plain name'),
  'a shard in a folder below': (_index_fault(lambda m: m.update(c=f'x/{_TWO}')), 'plain name'),
  'a shard anywhere': (_index_fault(lambda m: m.update(c='/etc/x.safetensors')), 'plain name'),
  'a shard with a backslash': (
    _index_fault(lambda m: m.update(c='..\\x.safetensors')),
    'plain name',
  ),
  'a hidden shard': (_index_fault(lambda m: m.update(c='.safetensors')), 'plain name'),
  'a shard name with a zero': (_index_fault(lambda m: m.update(c='\0.safetensors')), 'plain name'),
  'a shard that is a pickle': (_index_fault(lambda m: m.update(c='x.bin')), 'plain name'),
  'a shard name of 300 letters': (
    _index_fault(lambda m: m.update(c='x' * 300 + '.safetensors')),
    'cannot be opened: File name too long',
  ),
  'a shard that is a number': (_index_fault(lambda m: m.update(c=2)), 'plain name'),
  'a shard that is nothing': (_index_fault(lambda m: m.update(c='')), 'plain name'),
  'no weight_map': (_rewrite('{"metadata": {}}'), 'weight_map is None'),
  'an empty weight_map': (_rewrite('{"weight_map": {}}'), 'weight_map is {}'),
  'weight_map is a list': (_rewrite('{"weight_map": ["a"]}'), 'weight_map is'),
  'index is a list': (_rewrite('[]'), 'holds a JSON list; must be an object'),
  'index is not JSON': (_rewrite('{"weight_map": {'), 'cannot be read as JSON'),
  'index is empty': (_rewrite(''), 'cannot be read as JSON'),
  'index with a tensor twice': (
    _rewrite(f'{{"weight_map": {{"a": "{_ONE}", "a": "{_ONE}"}}}}'),
    "key 'a' appears twice",
  ),
  'index nested deep': (_rewrite('{"weight_map":' + '{"a":' * 200_000), 'nested too deep'),
  'a truncated shard': (lambda f, _: os.truncate(f / _ONE, 60), 'truncated'),
  'a shard that is a folder': (
    lambda f, _: ((f / _ONE).unlink(), (f / _ONE).mkdir()),
    'no regular file',
  ),
  'a shard that is a pipe': (
    lambda f, _: ((f / _ONE).unlink(), os.mkfifo(f / _ONE)),
    'no regular file',
  ),
  'a link to nothing': (
    lambda f, _: ((f / _ONE).unlink(), (f / _ONE).symlink_to('x')),
    'cannot be opened',
  ),
  'both kinds': (lambda f, _: (f / shards.SINGLE).write_bytes(_GOOD), 'holds both'),
  'no index': (lambda f, _: (f / shards.INDEX).unlink(), f'holds {_ONE} but no'),
}


@pytest.mark.parametrize('case', _BAD_FOLDERS)
def test_a_folder_that_contradicts_itself_is_refused_and_left_alone(tmp_path, case):
  change, why = _BAD_FOLDERS[case]
  folder = tmp_path / 'a'
  change(folder, _two_shards(folder))
  before = sorted(folder.iterdir())
  with pytest.raises(FormatError, match=why) as error:
    shards.Folder(folder)
  assert '\n' not in str(error.value)
  assert sorted(folder.iterdir()) == before


class _Bomb:
  def __reduce__(self):
    return os.mkdir, ('exploded',)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.pth', shards.SINGLE])
def test_a_pickle_is_never_read(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / 'a'
  folder.mkdir()
  (folder / name).write_bytes(pickle.dumps(_Bomb()))
  with pytest.raises(FormatError, match=r'pickle|safetensors file'):
    shards.Folder(folder)
  assert not (tmp_path / 'exploded').exists()


def test_a_missing_or_an_empty_folder_says_what_it_should_hold(tmp_path):
  with pytest.raises(FormatError, match='no such folder'):
    shards.Folder(tmp_path / 'nowhere')
  with pytest.raises(FormatError, match=r'holds no model\.safetensors and no model'):
    shards.Folder(tmp_path)


def test_files_beside_the_index_are_not_asked_for(tmp_path):
  index = _two_shards(tmp_path / 'a')
  (tmp_path / 'a' / 'consolidated.safetensors').write_bytes(b'broken')
  (tmp_path / 'a' / 'optimizer.pt').write_bytes(b'broken')
  assert shards.Folder(tmp_path / 'a').tensors.keys() == index['weight_map'].keys()
