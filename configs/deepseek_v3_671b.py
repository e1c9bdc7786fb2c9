r"""DeepSeek-V3, 671B parameters of which 37B act on a token (arXiv 2412.19437, 4.1 and 4.2).

Pre-training on 14.8T tokens at length 4,096. Every value is the report's and stands, with its
section, in dsv3_jax/config.py: they are the defaults. What the report leaves open, or does
otherwise:

- the batch grows from 3,072 to 15,360 sequences linearly in tokens (the report: "gradually");
- AdamW's epsilon is 1e-8 and the average of the weights decays by 0.999;
- matmuls run in BF16; the report runs most of them in FP8: `--config.model.precision=fp8`.

The mesh belongs to the machine, so it is left to the command line. On 1,024 devices, experts over
64 of them as in the report, weights split over all:

  python -m dsv3_jax.train --config=configs/deepseek_v3_671b.py --workdir=WORKDIR \
    --config.mesh.data=16 --config.mesh.node=8 --config.mesh.local=8 --config.mesh.zero=3 \
    --config.batch.micro_size=1024 --config.data.corpus=CORPUS --config.data.tokenizer=FILE

The same program in seconds on a laptop, every mechanism on:

  python -m dsv3_jax.train --config=configs/deepseek_v3_671b.py:debug --workdir=/tmp/v3

Expected: 671,026,419,200 parameters and 11,610,068,224 more in the MTP module; 249.8 GFLOP a token.
The report's base model reaches 0.548 bits per byte on the Pile test set (Table 3).
"""

import ml_collections

from dsv3_jax import config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return config.variant(config.default(), arg)
