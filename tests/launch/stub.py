"""A training program in small for sweeps: says when it starts, takes a moment, leaves what training does."""

import json
import pathlib
import sys
import time

from absl import flags as absl_flags

from dsv3_jax import config, flags

_WORKDIR = absl_flags.DEFINE_string('workdir', None, '')


def main(c: config.Config, given: flags.Given) -> int:
  folder = pathlib.Path(_WORKDIR.value)
  (folder / 'config.json').write_text(config.to_json(c))
  with open(folder.parent / 'started', 'a') as file:
    file.write(f'{folder.name}\n')
  time.sleep(0.6)
  if c.run.seed == 3 and not (folder / 'tried').exists():
    (folder / 'tried').touch()
    return 1
  (folder / 'evaluation.json').write_text(json.dumps({'bits_per_byte': c.optimizer.peak_lr * 10}))
  with open(folder.parent / 'ended', 'a') as file:
    file.write(f'{folder.name}\n')
  return 0


if __name__ == '__main__':
  sys.exit(flags.run(main))
