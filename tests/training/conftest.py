"""A checkpointer in a folder of the test's own."""

import pathlib
from collections.abc import Iterator

import checkpoints
import pytest

from dsv3_jax.training import checkpoint


@pytest.fixture
def ckpt(tmp_path: pathlib.Path) -> Iterator[checkpoint.Checkpointer]:
  with checkpoint.Checkpointer(tmp_path / 'run', checkpoints.KEEP_ALL) as opened:
    yield opened
