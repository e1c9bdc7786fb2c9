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
  dual_batch: bool,
  prompts: int,
) -> None:
  """Raises ConfigError for one that cannot work; `engine.Engine` says what each is."""
  if slots < 1 or slots % ways:
    raise ConfigError(f'slots = {slots}: must be a positive multiple of the {ways} devices')
  for name, value, unit in (('slots', slots, ways), ('prompts', prompts, 1)):
    if dual_batch and value % (2 * unit):
      right = f'a multiple of {2 * unit}: dual_batch halves the rows of each device'
      raise ConfigError(f'{name} = {value}: must be {right}')
  if not 0 < prompts <= slots // ways:
    right = f'between 1 and {slots // ways}, the slots of a device'
    raise ConfigError(f'prompts = {prompts}: must be {right}')
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
