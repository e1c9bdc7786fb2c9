"""What sizes an engine can have."""

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.mla_decode import PAGE


def check(
  slots: int,
  ways: int,
  chunk: int,
  pages: int,
  drafts: int,
  mtp_depth: int,
  cache: str,
  steps: int,
) -> None:
  """Raises ConfigError for one that cannot work; `engine.Engine` says what each is."""
  if slots < 1 or slots % ways:
    raise ConfigError(f'slots = {slots}: must be a positive multiple of the {ways} devices')
  if chunk < PAGE or chunk % PAGE:
    raise ConfigError(
      f'chunk = {chunk}: must be a positive multiple of {PAGE}, the tokens of a page'
    )
  for name, value in (('pages', pages), ('steps', steps)):
    if value < 1:
      raise ConfigError(f'{name} = {value}: must be at least 1')
  if drafts < 0 or (drafts and not mtp_depth):
    right = 'at least 0' if drafts < 0 else '0: the model has no MTP module (model.mtp_depth = 0)'
    raise ConfigError(f'drafts = {drafts}: must be {right}')
  if cache not in ('plain', 'fp8'):
    raise ConfigError(f"cache = {cache!r}: must be 'plain' or 'fp8'")
