"""Two repairs of Orbax, made where this module is imported, before anything is saved or restored.

Chunks get checksums. OCDBT checks its index but not the array chunks behind it: a flipped byte in a large
leaf came back as a silently different number. TensorStore can checksum chunks and Orbax has no option for
it, so the codec is added to the metadata that Orbax builds. Cost: 4 bytes a chunk and a CRC in
TensorStore's own threads; nothing on the devices, nothing that depends on the mesh. (A digest computed on
the devices took four seconds to compile for the 160 leaves of a model.) What flips before a chunk is
encoded is not seen.

After a fault, reads and writes under way end before the fault is raised.

Both replace private names, for the whole process because Orbax's background threads look them up. Were one
to move, the import fails; were one to lose its effect, the tests of damage and of the full disk do.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.serialization import tensorstore_utils


def _with_checksums(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
  """The builder of Zarr 3 metadata, with a CRC-32C behind the compression of every chunk."""

  @functools.wraps(build)
  def built(*args: Any, **kwargs: Any) -> dict[str, Any]:
    metadata = build(*args, **kwargs)
    chunk_codecs = metadata['codecs'][0]['configuration']['codecs']
    if {'name': 'crc32c'} not in chunk_codecs:
      chunk_codecs.append({'name': 'crc32c'})
    return metadata

  return built


def _to_the_end(run: Callable[[Coroutine], Any]) -> Callable[[Coroutine], Any]:
  """The runner of coroutines, except that after a fault the reads or writes under way end first.

  Left as it is, the event loop closes under them: each then prints a traceback of its own, and writes
  go on into a folder that is being removed.
  """

  async def whole(task: Coroutine) -> Any:
    try:
      return await task
    except Exception:
      rest = asyncio.all_tasks() - {asyncio.current_task()}
      await asyncio.gather(*rest, return_exceptions=True)
      raise

  @functools.wraps(run)
  def ran(task: Coroutine) -> Any:
    return run(whole(task))

  return ran


tensorstore_utils._build_zarr3_metadata = _with_checksums(tensorstore_utils._build_zarr3_metadata)
asyncio_utils._run_sync_via_new_loop = _to_the_end(asyncio_utils._run_sync_via_new_loop)
