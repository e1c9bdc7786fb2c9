"""Byte-level BPE (4.1): trained on the corpus, or read from a released `tokenizer.json`.

Text is cut into pieces by a regular expression before merges are learned inside the pieces. The pieces
are those of the released tokenizer without its rule for Chinese, Japanese and Korean: up to three
digits; a punctuation mark with the letters after it (`.append`, `_name`); letters with one character
before them, mostly a space; runs of punctuation with the line breaks after them; blank lines; runs of
spaces, of which the last goes with the word that follows. Whatever no rule takes stays a piece, and
all 256 bytes are in the vocabulary, so `decode(encode(text)) == text` for every text.

Special tokens never come out of `encode`: a text that spells one out is text.
"""

# ruff: noqa: RUF001 (the special tokens are spelled with fullwidth bars)

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import ConfigError, Data
from dsv3_jax.data.corpora import Corpus, cache_dir

BOS, EOS, PAD = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜▁pad▁｜>'
FIM_BEGIN, FIM_HOLE, FIM_END = '<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>'
SPECIAL = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)  # in the order of their ids: 0, 1, 2 ...

_DIGITS = r'\p{N}{1,3}'
_WORDS = (
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
  r'|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+'
  r'| ?[\p{P}\p{S}]+[\r\n]*'
  r'|\s*[\r\n]+'
  r'|\s+(?!\S)'
  r'|\s+'
)
_MIN_PAIRS = 2  # a pair seen once is not worth an entry
# Text to train on, of a corpus that has more: 20 MB take about 10 s on two cores.
_MIN_BYTES, _BYTES_PER_ENTRY = 20_000_000, 2048


class Tokenizer:
  """Text to ids and back. Picklable. `vocab_size` is one more than the largest id.

  `control`: ids of the special tokens by their spellings.
  """

  def __init__(self, definition: str):
    """`definition` is the content of a tokenizer.json; raises ValueError if it cannot serve."""
    spec = json.loads(definition)
    spec['truncation'] = spec['padding'] = None
    # Released files mark some of their control tokens as ordinary ones, which `encode` would then find
    # in text. Other added tokens (runs of spaces, say) are text and stay as they are.
    for token in spec['added_tokens']:
      token['special'] |= token['content'].startswith('<｜') or token['content'] in SPECIAL
    self._definition = json.dumps(spec, ensure_ascii=False)
    self._tokenizer = tokenizers.Tokenizer.from_str(self._definition)
    self._tokenizer.encode_special_tokens = True  # as the text that they are
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIAL if token not in ids and token != PAD]
    if missing:
      raise ValueError(f'lacks the special tokens {" ".join(missing)}')
    for token in spec['added_tokens']:
      if ids[token['content']] != token['id']:  # the package numbers them on from the vocabulary
        where = f'{token["id"]} for {token["content"]!r}'
        raise ValueError(f'skips ids below {where}, which would be read as {ids[token["content"]]}')
    special = [token['content'] for token in spec['added_tokens'] if token['special']]
    self.control = {spelling: ids[spelling] for spelling in special}
    self.vocab_size = max(ids.values()) + 1
    self.bos_id, self.eos_id = ids[BOS], ids[EOS]
    self.pad_id = ids.get(PAD, self.eos_id)  # older releases have none; padding is never a target
    self.fim_begin_id, self.fim_hole_id = ids[FIM_BEGIN], ids[FIM_HOLE]
    self.fim_end_id = ids[FIM_END]

  def __reduce__(self) -> tuple:
    return Tokenizer, (self._definition,)

  @property
  def fingerprint(self) -> str:
    return _digest(self._definition)

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos, eos or any other special token."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on several threads."""
    return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`; special tokens are left out or spelled out, bytes that are not UTF-8 become U+FFFD.

    Ids above the vocabulary (the padded rows of the embedding) have no text and are left out.
    """
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def save(self, path: str | os.PathLike) -> None:
    """Writes a tokenizer.json, whole or not at all."""
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      whole = pathlib.Path(folder, path.name)
      whole.write_text(self._definition, encoding='utf-8')
      whole.replace(path)


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_tokenizer(data: Data, vocab_size: int, corpus: Corpus) -> Tokenizer:
  """The tokenizer of `data.tokenizer`, or one of `vocab_size` trained on `corpus`, kept in the cache.

  Where the corpus cannot fill `vocab_size`, the tokenizer has fewer entries. Raises ConfigError if the
  file cannot serve or `vocab_size` has no room for its tokens.
  """
  if data.tokenizer:
    return _read(data, vocab_size)
  smallest = 256 + len(SPECIAL)
  if vocab_size < smallest:
    right = f'must be at least {smallest}: the bytes and {len(SPECIAL)} special tokens'
    raise ConfigError(f'model.vocab_size = {vocab_size}: {right}')
  recipe = [SPECIAL, _DIGITS, _WORDS, _MIN_PAIRS, _MIN_BYTES, _BYTES_PER_ENTRY]
  key = _digest(json.dumps([corpus.fingerprint, vocab_size, recipe]))
  path = cache_dir(data) / f'tokenizer-{vocab_size}-{key}.json'
  if not path.exists():
    train(corpus.train, vocab_size).save(path)
  return Tokenizer(path.read_text(encoding='utf-8'))


def train(documents: Sequence[str], vocab_size: int) -> Tokenizer:
  """Byte-level BPE of at most `vocab_size` entries; the same documents give the same tokenizer."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_DIGITS), 'isolated'),
      pre_tokenizers.Split(tokenizers.Regex(_WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=_MIN_PAIRS,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  size = max(_MIN_BYTES, _BYTES_PER_ENTRY * vocab_size)
  bpe.train_from_iterator(_sample(documents, size), trainer)
  return Tokenizer(bpe.to_str())


def _sample(documents: Sequence[str], size: int) -> Iterator[str]:
  """Documents from all over the corpus, in a fixed random order, until they hold `size` bytes."""
  for i in np.random.default_rng(0).permutation(len(documents)):
    text = documents[int(i)]
    yield text
    size -= len(text.encode('utf-8'))
    if size <= 0:
      return


def _read(data: Data, vocab_size: int) -> Tokenizer:
  """The tokenizer of the file `data.tokenizer`."""
  path = pathlib.Path(data.tokenizer).expanduser()

  def fault(right: str) -> ConfigError:
    return ConfigError(f'data.tokenizer = {data.tokenizer!r}: {right}')

  if not path.is_file():
    raise fault("no such file; wants a tokenizer.json, or '' to train one on the corpus")
  try:
    tokenizer = Tokenizer(path.read_text(encoding='utf-8'))
  except Exception as error:  # the tokenizers package raises nothing narrower
    raise fault(f'cannot be used as a tokenizer.json: {error}') from None
  if tokenizer.vocab_size > vocab_size:
    raise fault(f'needs model.vocab_size = {tokenizer.vocab_size} or more, not {vocab_size}')
  return tokenizer
