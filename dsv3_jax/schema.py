"""What can be configured: frozen dataclasses whose defaults are the values of the DeepSeek-V3 report.

Every number that follows from others is a property elsewhere: parameter counts and training FLOPs stand in
`dsv3_jax/counts.py`. Sources are sections of arXiv 2412.19437 unless said otherwise.
"""

import dataclasses
from typing import Any


class ConfigError(ValueError):
  """A value that cannot work; the message names the key, the value and what would be right."""


@dataclasses.dataclass(frozen=True)
class Mla:
  """Multi-head Latent Attention (2.1.1)."""

  num_heads: int = 128
  q_rank: int = 1536  # d_c'; 0 projects queries directly, as V2-Lite does
  kv_rank: int = 512  # d_c
  nope_dim: int = 128  # d_h, per head, without position
  rope_dim: int = 64  # d_h^R, per head for queries, shared by all heads for keys
  v_dim: int = 128
  block: int = 512  # queries and keys per block of the blockwise attention


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding, with YaRN (4.3) where `model.max_length` exceeds `original_length`."""

  theta: float = 10_000.0
  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0  # scales cos and sin by m(mscale) / m(mscale_all_dim); 1 in every release
  mscale_all_dim: float = 1.0  # scales the softmax by m(mscale_all_dim)^2


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How tokens reach their experts and come back; forms in `dsv3_jax/parallel/dispatch.py`."""

  form: str = 'auto'  # 'auto' | 'two_hop' | 'flat' | 'allgather' | 'ragged' | 'dense' (oracle)
  capacity: float = (
    1.25  # buffers over what even routing needs; what does not fit goes in more rounds
  )
  payload: str = (
    'fp8'  # out (3.3.2): 'fp8', 1x128, power-of-two scales | 'bf16' | 'plain', as computed
  )
  combine: str = 'bf16'  # back: 'bf16' | 'logfmt8' | 'logfmt10' (2505.09343) | 'plain'


@dataclasses.dataclass(frozen=True)
class Moe:
  """DeepSeekMoE (2.1.2)."""

  num_experts: int = 256
  num_shared: int = 1
  top_k: int = 8
  expert_dim: int = 2048
  num_groups: int = 8
  top_groups: int = 4
  scoring: str = 'sigmoid'  # 'sigmoid' (V3: biased, a group is its two best) | 'softmax' (V2)
  normalize: bool = True  # weights of the chosen experts sum to 1 before the route scale
  route_scale: float = 2.5
  dispatch: Dispatch = Dispatch()


@dataclasses.dataclass(frozen=True)
class Model:
  vocab_size: int = 129_280
  dim: int = 7168
  ffn_dim: int = 18_432  # hidden width of the dense layers
  num_layers: int = 61
  num_dense_layers: int = 3  # the first ones
  mtp_depth: int = 1  # 2.2
  norm_eps: float = 1e-6
  init_std: float = 0.006  # 4.2
  max_length: int = 4096  # longest sequence the model is set up for; decides whether YaRN is on
  # Operands of the matmuls: 'bf16' | 'fp32' | 'fp8' (3.3) | variants of it in `precision/recipe.py`;
  # weights and sums stay FP32.
  precision: str = 'bf16'
  remat: str = 'latents'  # 'none' | 'block' | 'latents' (3.3.3: RMSNorms and MLA up-projections)
  unroll: int = 1  # layers per iteration of the scan; more is faster on CPU and compiles longer
  # 3.4.1: two halves of a device's rows go through the layers out of step, so that one's exchange stands
  # beside the other's compute.
  dual_batch: bool = False
  mla: Mla = Mla()
  rope: Rope = Rope()
  moe: Moe = Moe()


@dataclasses.dataclass(frozen=True)
class Batch:
  """Sizes of a step (4.2). The ramp is linear in tokens; the report does not give its shape."""

  seq_len: int = 4096
  size: int = 15_360  # sequences per step after the ramp
  start_size: int = 3072
  ramp_tokens: float = 469e9
  micro_size: int = 3072  # sequences per micro-batch, over all devices; the rest accumulates


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its four-phase learning rate as a function of tokens seen (4.2)."""

  peak_lr: float = 2.2e-4
  warmup_steps: int = 2000
  constant_tokens: float = 10e12  # the peak is held until here
  decay_tokens: float = 4.3e12  # then cosine to end_lr
  end_lr: float = 2.2e-5
  end_tokens: float = 333e9  # then end_lr
  final_lr: float = 7.3e-6  # then this one, to the end
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8  # not given in the report
  weight_decay: float = 0.1  # on matrices; norms are left alone
  clip_norm: float = 1.0
  moments: str = 'bf16'  # 'bf16' | 'fp32' (3.3.3)
  ema_decay: float = 0.999  # 3.2.3 keeps an average of the weights and gives no decay; 0 keeps none


@dataclasses.dataclass(frozen=True)
class Objective:
  """Loss = CE + mtp_weight / D * MTP + balance_alpha * balance (2.1.2, 2.2, 4.2)."""

  mtp_weight: float = 0.3
  mtp_weight_late: float = 0.1
  mtp_late_tokens: float = 10e12
  balance_alpha: float = 1e-4
  bias_speed: float = 1e-3  # gamma
  bias_stop_tokens: float = 14.3e12  # gamma is 0 from here


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device mesh; the axes are described in `dsv3_jax/mesh.py`."""

  pipe: int = 1  # stages: 1, or an even number (3.2.1: 16)
  data: int = 1
  node: int = 1
  local: int = 1
  zero: int = 1  # state: 0 replicated | 1 split, gathered once a step | 3 gathered by layer
  # with zero 3, weights of at least so many elements are gathered by permutes, which TPUs run beside compute,
  # smaller ones by the backend's collective; 0: none
  zero_permutes: int = 0


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How ranks run with `mesh.pipe` > 1."""

  # 'uniform': one program, all ranks the same kind of thing at a time | 'mpmd': DualPipe's own order (3.2.1),
  # each rank programs of its own
  executor: str = 'uniform'
  # of 'uniform', where gradients of weights that idle moments could make wait for: 'deferred', the end, in
  # buffers | 'at_once', nothing: less memory, PP/2 - 1 weight parts more
  weight_part: str = 'deferred'


@dataclasses.dataclass(frozen=True)
class Data:
  corpus: str = 'python_stdlib'  # that | a prepared TFDS name | a folder of text or JSONL files
  text_key: str = 'text'  # field that holds the text, for TFDS and JSONL
  tokenizer: str = ''  # a tokenizer.json; '' trains a BPE of model.vocab_size on the corpus
  fim_rate: float = 0.1  # documents turned into prefix-suffix-middle (4.1)
  shuffle_rows: int = (
    1024  # rows of the packed stream that are shuffled at a time; 1 keeps its order
  )
  heldout: float = 0.02  # fraction of the documents kept for evaluation
  cache_dir: str = ''  # prepared corpora and trained tokenizers; '' is ~/.cache/dsv3_jax
  workers: int = 0  # worker processes of the input pipeline


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every_steps: int = 500
  keep_last: int = 3
  keep_every: int = 0  # steps; 0 keeps only the last ones


@dataclasses.dataclass(frozen=True)
class Run:
  total_tokens: float = 14.8e12
  seed: int = 0
  log_every: int = 10
  eval_every: int = 1000  # 0: only at the end
  eval_bytes: int = 50_000_000  # of the held-out text
  prompt: str = 'def '  # of the sample at the end
  init_from: str = ''  # folder of an import or a run to take weights and tokenizer from


@dataclasses.dataclass(frozen=True)
class Config:
  model: Model = Model()
  batch: Batch = Batch()
  optimizer: Optimizer = Optimizer()
  objective: Objective = Objective()
  mesh: Mesh = Mesh()
  pipeline: Pipeline = Pipeline()
  data: Data = Data()
  checkpoint: Checkpoint = Checkpoint()
  run: Run = Run()


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'model.mla.num_heads': 128, ...}"""
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    key = prefix + field.name
    flat |= flatten(value, key + '.') if dataclasses.is_dataclass(value) else {key: value}
  return flat
