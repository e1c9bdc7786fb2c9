import concurrent.futures
import json
import pathlib
import pickle
import subprocess
import sys
import sysconfig

import pytest

from dsv3_jax.config import ConfigError, Data
from dsv3_jax.data import corpora


def write_jsonl(path: pathlib.Path, records: list) -> None:
  path.write_text('\n\n'.join(json.dumps(r) for r in records) + '\n', encoding='utf-8')


def everything(corpus: corpora.Corpus) -> list[str]:
  return sorted([*corpus.train, *corpus.heldout])


def test_a_folder_gives_every_file_and_line_once_and_exactly(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / '.git').mkdir()
  (tmp_path / '.git' / 'hidden.txt').write_text('hidden')
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'photo.png').write_bytes(b'\x89PNG\xff')
  (tmp_path / 'a.txt').write_bytes('one\r\ntwo é'.encode())
  (tmp_path / 'sub' / 'b.PY').write_text('three')
  lines = [{'text': f'line {i} é\n', 'other': i} for i in range(30)]
  write_jsonl(tmp_path / 'sub' / 'c.jsonl', lines)
  corpus = corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.3))
  assert everything(corpus) == sorted(['one\r\ntwo é', 'three', *(r['text'] for r in lines)])
  assert everything(pickle.loads(pickle.dumps(corpus))) == everything(corpus)
  assert corpus.bytes is None


def test_bytes_of_a_folder_of_text_are_those_of_its_files(folder, corpus):
  assert corpus.bytes == sum(p.stat().st_size for p in folder.rglob('*.txt'))
  assert corpus.bytes == sum(len(text.encode()) for text in everything(corpus))


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "x\\ud800y"}\n{"text": "\\ud83d\\ude00"}\n' * 20)
  corpus = corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.5))
  assert set(everything(corpus)) == {'x\ufffdy', '\U0001f600'}


def test_the_split_is_disjoint_complete_and_the_same_again(folder, cfg, corpus):
  train, heldout = list(corpus.train), list(corpus.heldout)
  assert not set(train) & set(heldout)
  assert sorted(train + heldout) == sorted(p.read_bytes().decode() for p in folder.rglob('*.txt'))
  again = corpora.open_corpus(cfg.data)
  assert (list(again.train), list(again.heldout)) == (train, heldout)
  assert again.fingerprint == corpus.fingerprint


def test_a_larger_fraction_keeps_the_held_out_documents_in_their_order(tmp_path):
  write_jsonl(tmp_path / 'a.jsonl', [{'text': str(i)} for i in range(2000)])
  few, more = (corpora.open_corpus(Data(corpus=str(tmp_path), heldout=h)) for h in (0.1, 0.3))
  assert list(more.heldout)[: len(few.heldout)] == list(few.heldout)
  assert abs(len(few.heldout) / 2000 - 0.1) < 0.02
  assert abs(len(more.heldout) / 2000 - 0.3) < 0.03
  assert few.fingerprint != more.fingerprint


def test_a_new_file_moves_no_other_document_and_changes_the_fingerprint(tmp_path):
  for i in range(50):
    (tmp_path / f'{i:02}.txt').write_text(f'document {i}')
  before = corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.3))
  (tmp_path / '00a.txt').write_text('new')
  after = corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.3))
  assert set(before.train) <= set(after.train)
  assert set(before.heldout) <= set(after.heldout)
  assert before.fingerprint != after.fingerprint


def test_an_edit_of_the_same_length_changes_the_fingerprint(tmp_path):
  for i in range(20):
    (tmp_path / f'{i}.txt').write_text('aaaa')
  before = corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.5)).fingerprint
  (tmp_path / '7.txt').write_text('aaba')
  assert corpora.open_corpus(Data(corpus=str(tmp_path), heldout=0.5)).fingerprint != before


# ---- errors --------------------------------------------------------------------------------------


def fault(**data) -> str:
  with pytest.raises(ConfigError) as error:
    corpora.open_corpus(Data(**data))
  assert '\n' not in str(error.value)
  return str(error.value)


def test_errors_name_the_missing_folder_the_empty_one_and_the_unknown_dataset(tmp_path):
  missing = str(tmp_path / 'missing')
  assert f"data.corpus = '{missing}': no such folder" in fault(corpus=missing)
  assert 'holds no text' in fault(corpus=str(tmp_path))
  (tmp_path / 'a.txt').write_text('x')
  assert 'is a file; name the folder' in fault(corpus=str(tmp_path / 'a.txt'))
  for name in ('no_such_dataset', 'not a name!'):
    assert 'neither a folder nor a TFDS dataset' in fault(corpus=name, cache_dir=str(tmp_path))


def test_errors_name_the_file_that_is_not_text(tmp_path):
  (tmp_path / 'good.txt').write_text('good')
  (tmp_path / 'bad.txt').write_bytes(b'caf\xe9 ')
  message = fault(corpus=str(tmp_path))
  assert 'bad.txt: is not UTF-8' in message
  assert 'byte 3' in message


@pytest.mark.parametrize(
  ('line', 'says'),
  [
    ('{"title": "x", "body": "y"}', 'it has title, body'),
    ('{"text": 3}', 'holds int, not text'),
    ('{"text": ', 'is not JSON'),
    ('["x"]', 'is a JSON list'),
  ],
)
def test_errors_name_the_line_and_its_keys(tmp_path, line, says):
  (tmp_path / 'a.txt').write_text('x')
  (tmp_path / 'b.jsonl').write_text('\n' + line + '\n')
  message = fault(corpus=str(tmp_path), heldout=0.5)
  assert says in message
  assert 'b.jsonl, the line at byte 1' in message


def test_errors_say_when_the_split_leaves_nothing_on_either_side(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  assert 'none of 1 documents for evaluation; choose a larger' in fault(
    corpus=str(tmp_path), heldout=1e-9
  )
  assert 'none of 1 documents for training; choose a smaller' in fault(
    corpus=str(tmp_path), heldout=1 - 1e-9
  )


def test_an_error_names_a_cache_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ConfigError, match=r'data\.cache_dir .* cannot make'):
    corpora.cache_dir(Data(cache_dir=str(tmp_path / 'file' / 'cache')))


# ---- the standard library, through TFDS ----------------------------------------------------------


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch) -> dict[str, str]:
  """A standard library of 30 files, with what has to be left out beside them."""
  root = tmp_path / 'lib'
  texts = {f'package{i % 3}/module{i:02}.py': f'x = {i}  # é\r\n' * (i + 1) for i in range(30)}
  for path, text in texts.items():
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text.encode())
  for left_out in ('site-packages/other.py', 'package0/__pycache__/x.py', 'package0/notes.txt'):
    (root / left_out).parent.mkdir(parents=True, exist_ok=True)
    (root / left_out).write_text('left out')
  (root / 'latin1.py').write_bytes(b'# caf\xe9')
  (root / 'empty.py').write_bytes(b'')
  real = sysconfig.get_path
  monkeypatch.setattr(
    sysconfig, 'get_path', lambda name, *a: str(root) if name == 'stdlib' else real(name, *a)
  )
  return texts


def test_the_stdlib_corpus_holds_its_text_files_exactly_and_is_silent(
  small_stdlib, tmp_path, capfd
):
  data = Data(cache_dir=str(tmp_path / 'cache'), heldout=0.2)
  corpus = corpora.open_corpus(data)
  assert everything(corpus) == sorted(small_stdlib.values())
  again = corpora.open_corpus(data)
  assert list(again.heldout) == list(corpus.heldout)
  assert again.fingerprint == corpus.fingerprint
  assert everything(pickle.loads(pickle.dumps(corpus))) == everything(corpus)
  assert capfd.readouterr() == ('', '')


def test_a_prepared_tfds_name_opens_and_an_unknown_field_names_the_ones_it_has(
  small_stdlib, tmp_path
):
  cache = str(tmp_path / 'cache')
  corpora.open_corpus(Data(cache_dir=cache, heldout=0.2))
  name = 'python_stdlib:{}.{}.{}'.format(*sys.version_info[:3])
  corpus = corpora.open_corpus(Data(corpus=name, cache_dir=cache, heldout=0.2))
  assert everything(corpus) == sorted(small_stdlib.values())
  paths = corpora.open_corpus(Data(corpus=name, text_key='path', cache_dir=cache, heldout=0.2))
  assert everything(paths) == sorted(small_stdlib)
  message = fault(corpus=name, text_key='body', cache_dir=cache, heldout=0.2)
  assert "data.text_key = 'body': no such field" in message
  assert 'it has path, text' in message


def test_builders_that_prepare_at_the_same_time_leave_one_whole_dataset(
  small_stdlib, tmp_path, monkeypatch
):
  from dsv3_jax.data import stdlib_corpus

  cache = tmp_path / 'cache'
  cache.mkdir()
  real = stdlib_corpus.source_files

  def slow(root):  # another process finishes while this one is writing
    yield from real(root)
    monkeypatch.setattr(stdlib_corpus, 'source_files', real)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(stdlib_corpus.prepare, cache).result()

  monkeypatch.setattr(stdlib_corpus, 'source_files', slow)
  source = stdlib_corpus.prepare(cache).as_data_source(split='train')
  assert sorted(r['text'].decode() for r in source) == sorted(small_stdlib.values())
  assert len(list((cache / 'python_stdlib').iterdir())) == 1


def test_the_modules_import_without_tensorflow_and_without_warnings():
  code = (
    'import sys; import dsv3_jax.data.batches, dsv3_jax.data.stdlib_corpus; '
    'assert "tensorflow" not in sys.modules'
  )
  done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
