"""Checkpoints: state and data position committed together, in the background; checked on return.

One folder per checkpoint, named by its step, written under a temporary name and renamed when whole:

  <directory>/<step>/state   the arrays, as Orbax writes them: OCDBT, Zarr 3, zstd, CRC-32C
  <directory>/<step>/meta    JSON: data position; dtype and shape of every leaf; its own CRC-32

A process killed while it saves leaves a temporary folder, which nobody reads and the next run's
first save removes. Each process writes and reads only the parts its devices hold, so a state saved
on one mesh returns on any other, and no device or host ever sees all of it.

Damage. `restore` falls back to the newest checkpoint that is whole. Every chunk has a checksum, and every
fault ends all reads and writes, by `orbax_repairs`.

Reading changes nothing on disk: another program may restore from a directory that a run writes to.
Beside those repairs, this is the only module that imports Orbax. It does not decide when to save.
"""

import contextlib
import dataclasses
import json
import logging
import re
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dsv3_jax import config
from dsv3_jax.training import orbax_repairs  # noqa: F401 (importing it makes them)

_log = logging.getLogger(__name__)
_LEFTOVER = re.compile(r'\d+\.(orbax-checkpoint-tmp|deleted).*')  # of a process that was killed


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written or used: one line with the directory, why, and what to do."""


class _DamagedError(Exception):
  """This checkpoint is not what was saved; the text says why, in a few words."""


@dataclasses.dataclass(frozen=True)
class Restored:
  step: int
  state: Any  # nested dict of jax.Arrays, sharded as asked
  data_state: dict[str, Any]


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores the checkpoints of one run; a context manager.

  In a multi-process run every process makes one and calls the same methods in the same order
  (`steps` aside, which any may call alone); `directory` must be one that all of them see.
  """

  def __init__(self, directory: epath.PathLike, options: config.Checkpoint):
    logging.getLogger('absl').addFilter(_is_worth_showing)
    self._directory = epath.Path(directory).expanduser().resolve()
    self._options = options
    self._current: int | None = None  # step of the state in hand: restored, or last committed
    self._saving: int | None = None  # step being written in the background
    self._ready = False  # directory seen to, since the last restore
    self._reader = ocp.PyTreeCheckpointHandler()
    self._writer = _new_writer()

  def __exit__(self, *exception: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, oldest first, as the disk has them now."""
    if not self._directory.exists():
      return []
    named = [path for path in self._directory.iterdir() if re.fullmatch(r'0|[1-9]\d*', path.name)]
    return sorted(int(p.name) for p in named if ocp.utils.is_checkpoint_finalized(p))

  # ---- save --------------------------------------------------------------------------------------

  def save(self, step: int, state: Any, data_state: Mapping[str, Any]) -> None:
    """Copies `state` to the host, returns, and writes it in the background.

    The arrays may be donated or deleted as soon as this returns. An earlier save still being written
    is waited for first. Saving the step that was just restored or saved does nothing. Checkpoints
    newer than the one restored (an older one was asked for, or these were damaged) are set aside as
    '<step>.superseded' by the first save, so that no later restore picks them.

    Args:
      step: number of the checkpoint, larger than that of the state restored or saved before.
      state: nested dict of jax.Arrays, sharded in any way over any number of processes.
      data_state: position of the data iterator; small, and what JSON can hold (it returns as JSON
        has it: tuples as lists, keys as text).

    Raises:
      CheckpointError: this save could not start or the one before failed (disk full, ...), or the
        directory holds checkpoints that this run neither wrote nor restored.
    """
    self.wait()
    if step == self._current:
      return
    if self._current is not None and step < self._current:
      raise CheckpointError(
        f'checkpoint {step} in {self._directory} would be older than {self._current}, the one saved '
        'or restored last; restore an older one to go back'
      )
    meta = _seal({'step': step, 'data_state': dict(data_state), 'leaves': _leaves(state)})
    try:
      self._make_ready(step)
      self._saving = step
      self._writer.save(
        self._directory / str(step),
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
      )
    except CheckpointError:
      raise
    except Exception as error:
      raise self._not_written(step, error) from error

  def wait(self) -> None:
    """Returns when nothing is being written; raises CheckpointError if the last save failed.

    Old checkpoints are deleted here, after the new one is committed: the last `keep_last` and every
    multiple of `keep_every` stay. So a disk must hold one more than it keeps.
    """
    if self._saving is None:
      return
    step = self._saving
    try:
      self._writer.wait_until_finished()
    except Exception as error:
      raise self._not_written(step, error) from error
    self._current, self._saving = step, None
    if jax.process_index() == 0:
      every = self._options.keep_every
      for old in self.steps()[: -self._options.keep_last]:
        if not (every and old % every == 0):
          self._delete(old)

  def close(self) -> None:
    """Waits for the last save, raises its error if it failed, and frees the threads."""
    try:
      self.wait()
    finally:
      self._writer.close()
      self._reader.close()

  def _make_ready(self, step: int) -> None:
    """Before the first save: no leftovers, and nothing newer than the state in hand."""
    if self._ready:
      return
    if self._current is None:
      newer = [s for s in self.steps() if s >= step]
      if newer:
        raise CheckpointError(
          f'{self._directory} already holds checkpoint {newer[-1]} and this run starts from nothing: '
          'restore it first, or choose another directory'
        )
    elif jax.process_index() == 0:
      for later in [s for s in self.steps() if s > self._current]:
        aside = (self._directory / str(later)).rename(self._free_name(f'{later}.superseded'))
        _log.warning(
          'checkpoint %d is now %s: the run goes on from %d', later, aside, self._current
        )
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._remove_leftovers()
    self._ready = True

  def _not_written(self, step: int, error: Exception) -> CheckpointError:
    """Forgets the failed save, gives its space back, and says what happened."""
    self._saving, self._ready = None, False
    _let_writers_end()
    self._writer = _new_writer()  # the old one would repeat an error in its own metadata for ever
    if jax.process_index() == 0 and self._directory.exists():
      self._remove_leftovers()
    kept = self.steps()
    return CheckpointError(
      f'checkpoint {step} in {self._directory} could not be written: {_short(error)}; '
      + (f'the newest one on disk is {kept[-1]}' if kept else 'there is no other one on disk')
    )

  def _delete(self, step: int) -> None:
    # Renamed first, so that a kill half way never leaves half a checkpoint under a good name.
    try:
      doomed = (self._directory / str(step)).rename(self._free_name(f'{step}.deleted'))
      doomed.rmtree()
    except OSError as error:
      _log.warning('checkpoint %d in %s could not be deleted: %s', step, self._directory, error)

  def _remove_leftovers(self) -> None:
    try:
      for path in self._directory.iterdir():
        unfinished = path.name.isdigit() and not ocp.utils.is_checkpoint_finalized(path)
        if unfinished or _LEFTOVER.fullmatch(path.name):
          path.rmtree()
    except OSError as error:
      _log.warning('unfinished checkpoints in %s could not be removed: %s', self._directory, error)

  def _free_name(self, name: str) -> epath.Path:
    taken = {path.name for path in self._directory.iterdir()}
    names = [name] + [f'{name}.{i}' for i in range(2, len(taken) + 3)]
    return self._directory / next(n for n in names if n not in taken)

  # ---- restore -----------------------------------------------------------------------------------

  def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored | None:
    """The newest checkpoint that is whole, or the one of `step`; None when there is none at all.

    A damaged checkpoint is passed over for the next older one, with one line of warning that names
    both. Checkpoints are only ever passed over here, never changed.

    Args:
      abstract_state: nested dict of jax.ShapeDtypeStruct with shardings, on any mesh; each device
        reads its own part, bit-identical to what was saved.
      step: exactly this one; then damage is an error.

    Raises:
      CheckpointError: every checkpoint is damaged, or `step` is missing or damaged, or the keys,
        shapes or dtypes are those of another config.
    """
    for name, leaf in _named_leaves(abstract_state):
      if leaf.sharding is None:
        raise ValueError(f'abstract_state: {name} has no sharding; say where its parts belong')
    self.wait()
    here = _from_first_process(self.steps())
    if step is not None and step not in here:
      there = f'there are {", ".join(map(str, here))}' if here else 'there is none'
      raise CheckpointError(f'no checkpoint {step} in {self._directory}; {there}')
    damaged: dict[int, str] = {}
    for candidate in reversed(here if step is None else [step]):
      restored, reason = self._read(candidate, abstract_state)
      reason = _of_any_process(reason)
      if not reason:
        if damaged and jax.process_index() == 0:
          _log.warning(
            'damaged in %s: %s; using checkpoint %d', self._directory, _listed(damaged), candidate
          )
        self._current, self._ready = candidate, False
        return restored
      damaged[candidate] = reason
    if damaged:
      advice = 'move the directory away to start afresh' if step is None else 'restore another step'
      raise CheckpointError(
        f'no usable checkpoint in {self._directory}: {_listed(damaged)}; {advice}'
      )
    return None

  def _read(self, step: int, abstract_state: Any) -> tuple[Restored | None, str]:
    """One checkpoint, or why it is damaged. Meets no other process, so that one alone may fail."""
    path = self._directory / str(step)
    try:
      meta = _unseal((path / 'meta' / 'metadata').read_text())
    except (OSError, ValueError, LookupError, TypeError, _DamagedError) as error:
      return None, _short(error)
    self._require_same_leaves(step, meta['leaves'], _leaves(abstract_state))
    shardings = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    args = ocp.args.PyTreeRestore(abstract_state, restore_args=shardings)
    try:
      state = jax.block_until_ready(self._reader.restore(path / 'state', args=args))
    except Exception as error:  # TensorStore and Orbax raise nearly every kind on broken bytes
      return None, _short(error)
    return Restored(step, state, meta['data_state']), ''

  def _require_same_leaves(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differ = [
      f'{name}: {saved.get(name, "nothing")} in the checkpoint, {wanted.get(name, "nothing")} wanted'
      for name in sorted(saved | wanted)
      if saved.get(name) != wanted.get(name)
    ]
    if differ:
      more = f'; and {len(differ) - 3} more' if len(differ) > 3 else ''
      raise CheckpointError(
        f'checkpoint {step} in {self._directory} is of another config: {"; ".join(differ[:3])}{more}; '
        'use the config it was saved with, or another directory'
      )


def _new_writer() -> ocp.AsyncCheckpointer:
  # Folders are made before `save` returns: made in the background, one that cannot be made would
  # leave the writers waiting for it until a timeout of many minutes.
  options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
  handlers = ocp.DefaultCheckpointHandlerRegistry()
  handlers.add('state', ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_zarr3=True))
  handlers.add('meta', ocp.args.JsonSave, ocp.JsonCheckpointHandler())
  items = ocp.CompositeOptions(async_options=options)
  composite = ocp.CompositeCheckpointHandler(handler_registry=handlers, composite_options=items)
  return ocp.AsyncCheckpointer(composite, async_options=options)


def _let_writers_end() -> None:
  """After a fault in one of them: the others would go on filling the folder that is to be removed."""
  for thread in threading.enumerate():
    if type(thread).__module__.startswith('orbax.checkpoint'):
      threading.Thread.join(thread)  # not their own join, which raises


# ---- the JSON beside the arrays --------------------------------------------------------------------


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in flat]


def _leaves(tree: Any) -> dict[str, str]:
  """{'params/embed': 'bfloat16[512,32]', ...} of arrays or of ShapeDtypeStructs."""
  return {
    name: f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]' for name, leaf in _named_leaves(tree)
  }


def _seal(body: dict[str, Any]) -> dict[str, Any]:
  as_read = json.loads(json.dumps(body))  # keys that are numbers become text, and sort as text
  return {'body': as_read, 'crc32': _crc32(as_read)}


def _unseal(text: str) -> dict[str, Any]:
  sealed = json.loads(text)
  if _crc32(sealed['body']) != sealed['crc32']:
    raise _DamagedError('its JSON does not match its checksum')
  return sealed['body']


def _crc32(body: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


# ---- between processes -----------------------------------------------------------------------------


def _from_first_process(steps: list[int]) -> list[int]:
  """The first process's list, on all: their views of a shared disk may differ for a while."""
  if jax.process_count() == 1:
    return steps
  count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps), np.int32)))
  padded = np.asarray((steps + [0] * count)[:count], np.int32)
  return multihost_utils.broadcast_one_to_all(padded).tolist() if count else []


def _of_any_process(reason: str) -> str:
  """'' where every process found its part whole; else this one's reason, or that another has one."""
  if jax.process_count() == 1:
    return reason
  found = multihost_utils.process_allgather(np.asarray(bool(reason)))
  return reason or (f'not readable by process {np.argmax(found)}' if found.any() else '')


# ---- words -----------------------------------------------------------------------------------------


def _short(error: BaseException) -> str:
  """The last clause of the first cause: TensorStore's texts are chains with pages of specification."""
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(
    error, json.JSONDecodeError | UnicodeError | LookupError | TypeError | AttributeError
  ):
    return 'its metadata is broken'
  first = (str(error).strip() or type(error).__name__).splitlines()[0]
  plain = re.sub(r'(: expected=|\s*\[[\w ]+(\[\d+\])?=).*', '', first)  # CRCs, [os_error_code='28']
  last = re.split(r'(?:"|driver): ', plain)[-1]
  return last if len(last) <= 160 else f'{last[:60]} ... {last[-90:]}'


def _listed(damaged: dict[int, str]) -> str:
  shown = [f'checkpoint {step} ({reason})' for step, reason in list(damaged.items())[:3]]
  return ', '.join(shown) + (f' and {len(damaged) - 3} more' if len(damaged) > 3 else '')


def _is_worth_showing(record: logging.LogRecord) -> bool:
  """Orbax narrates each save at INFO, and prints the traceback of what it raises to us anyway."""
  is_orbax = '/orbax/checkpoint/' in record.pathname.replace('\\', '/')
  return not (is_orbax and (record.levelno <= logging.INFO or record.exc_info))
