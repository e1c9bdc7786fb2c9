"""TFDS builder over the Python standard library of the running interpreter.

About 12 MB of real text that every machine already has: no download, no TensorFlow. A document is one
source file, `{'path': 'json/decoder.py', 'text': ...}`; installed packages, the test suites (more than
half of the bytes, and not alike), tables written as source, empty files and the few files that are not
UTF-8 are left out. Records are ArrayRecord, in the order of their paths. The version
of the dataset is the version of Python, so two interpreters never share a folder.
"""

import contextlib
import io
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

import tensorflow_datasets as tfds

_SKIPPED = {
  'site-packages', 'dist-packages', '__pycache__',
  'test', 'tests', 'idle_test',
  'encodings', 'pydoc_data',
}  # fmt: skip


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Every module of the standard library, as text."""

  VERSION = tfds.core.Version('{}.{}.{}'.format(*sys.version_info[:3]))

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description='Source files of the Python standard library.',
      features=tfds.features.FeaturesDict({'path': text, 'text': text}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # the files are already here
    return {'train': self._generate_examples(pathlib.Path(sysconfig.get_path('stdlib')))}

  def _generate_examples(self, root: pathlib.Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, (path, text) in enumerate(source_files(root)):
      yield number, {'path': path, 'text': text}


def source_files(root: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (path below `root`, text) of each `*.py` that is UTF-8 and not empty, sorted by path."""
  found = (path.relative_to(root) for path in root.rglob('*.py'))
  for path in sorted(path.as_posix() for path in found if not _SKIPPED.intersection(path.parts)):
    try:
      text = (root / path).read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      continue
    if text:
      yield path, text


def prepare(data_dir: pathlib.Path) -> PythonStdlib:
  """Returns the builder, prepared below `data_dir`; the first time takes some seconds.

  TFDS writes into a folder with a random name and renames it when complete. Of processes that prepare
  at the same time the first to rename wins; the others find its folder in the way and read that one.
  """
  builder = PythonStdlib(data_dir=data_dir, file_format='array_record')
  if builder.data_path.exists():
    return builder
  try:
    # TFDS prints to stdout and draws progress bars on stderr, with no switch but a global one.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      builder.download_and_prepare()
  except OSError:
    if not builder.data_path.exists():
      raise
  return PythonStdlib(data_dir=data_dir, file_format='array_record')
