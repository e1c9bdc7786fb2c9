"""Which implementation of an operation runs: the one place where a name becomes a function.

An operation is a folder of `dsv3_jax/kernels`, an implementation a module in it: `reference` (plain and
slow), `xla` (any device), `mosaic_gpu` (Hopper), `pallas_tpu`. A module defines the folder's public
functions under their names, with the same arguments but `implementation`. One for chips also defines

  supports(function, *arguments, **options) -> None, or in one line why it cannot serve them

where arguments may be tracers. Modules for chips are imported when they are asked for.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import jax

NAMES = ('reference', 'xla', 'mosaic_gpu', 'pallas_tpu')
_OF_CHIP = {'gpu': 'mosaic_gpu', 'cuda': 'mosaic_gpu', 'tpu': 'pallas_tpu'}


def run(
  folder: str, function: str, implementation: str | None, *arguments: Any, **options: Any
) -> Any:
  """Calls `function` of the named implementation; None: the chip's own where it can serve, else 'xla'.

  A name that cannot serve raises ValueError with the reason and with the names that can.
  """
  if implementation is None:
    own = _OF_CHIP.get(platform())
    can = own is not None and not refusal(folder, function, own, *arguments, **options)
    implementation = own if can else 'xla'
  else:
    why = refusal(folder, function, implementation, *arguments, **options)
    if why:
      can = [n for n in NAMES if not refusal(folder, function, n, *arguments, **options)]
      raise ValueError(
        f'{function}: implementation = {implementation!r} cannot serve: {why}; '
        f'{", ".join(map(repr, can))} can'
      )
  return getattr(_module(folder, implementation), function)(*arguments, **options)


def refusal(folder: str, function: str, name: str, *arguments: Any, **options: Any) -> str | None:
  """Why an implementation cannot serve these arguments; None where it can."""
  if name not in NAMES:
    return f'there is none of that name, only {", ".join(map(repr, NAMES))}'
  module = _module(folder, name)
  if not hasattr(module, function):
    return f'{function} has none of that name'
  return module.supports(function, *arguments, **options) if hasattr(module, 'supports') else None


def platform() -> str:
  """Of the devices that are traced for: those of the mesh at hand, pods to compile for included."""
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return device.platform if device is not None else jax.default_backend()


@functools.cache
def _module(folder: str, name: str) -> ModuleType | None:
  path = f'dsv3_jax.kernels.{folder}.{name}'
  return importlib.import_module(path) if importlib.util.find_spec(path) else None
