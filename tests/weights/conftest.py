import pathlib

import pytest
import released


@pytest.fixture(scope='module')
def v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path, dict]:
  """(checkpoint, its import, its chunks) of a small V3."""
  root = tmp_path_factory.mktemp('v3')
  chunks = released.make(root / 'hf', released.model())
  released.convert('import', root / 'hf', root / 'work')
  return root / 'hf', root / 'work', chunks
