"""No key of a config is parsed and ignored: each is read by a file of the package."""

import ast
import dataclasses
import pathlib

from dsv3_jax import config

PACKAGE = pathlib.Path(config.__file__).parent
FLAT = config.flatten(config.freeze(config.debug(config.default())))
GROUPS = {c.__name__: c for c in vars(config).values() if dataclasses.is_dataclass(c)}
AT = {config.Config: ''}  # where each dataclass stands: {Mla: 'model.mla.'}
for group in [config.Config, config.Model, config.Moe]:
  for field in dataclasses.fields(group):
    if dataclasses.is_dataclass(field.type):
      AT[field.type] = f'{AT[group]}{field.name}.'


class Reads(ast.NodeVisitor):
  """Collects the keys that a file reads, following annotated arguments and assigned groups."""

  def __init__(self, tree):
    self.keys, self.kinds = set(), {}  # kinds: what a name, or 'self._x', is known to be
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    from_config = [n for n in nodes if n.module == 'dsv3_jax.config']
    self.imported = {alias.name for n in from_config for alias in n.names}
    self.visit(tree)
    self.visit(tree)  # methods may stand before the one that assigns

  def group(self, annotation):
    """The dataclass that an annotation names: `config.Model`, or `Model` where it is imported."""
    for node in ast.walk(annotation) if annotation else ():
      if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ('config', 'configs'):
        return GROUPS.get(node.attr)
      if isinstance(node, ast.Name) and node.id in self.imported:
        return GROUPS.get(node.id)

  def kind(self, node):
    if isinstance(node, ast.Attribute) and (group := self.kind(node.value)) in AT:
      return {f.name: f.type for f in dataclasses.fields(group)}.get(node.attr)
    if isinstance(node, ast.Attribute) and node.attr == 'config':
      return config.Config
    return self.kinds.get(ast.unparse(node))

  def visit_FunctionDef(self, node):
    outer = dict(self.kinds)
    for argument in [*node.args.args, *node.args.kwonlyargs]:
      self.kinds.pop(argument.arg, None)
      if group := self.group(argument.annotation):
        self.kinds[argument.arg] = group
    self.generic_visit(node)
    self.kinds = outer | {k: v for k, v in self.kinds.items() if k.startswith('self.')}

  def visit_Assign(self, node):
    for target in node.targets:
      both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
      pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
      for left, right in pairs:
        if (kind := self.kind(right)) in AT:
          self.kinds[ast.unparse(left)] = kind
    self.generic_visit(node)

  def visit_Attribute(self, node):
    if isinstance(node.ctx, ast.Load) and (group := self.kind(node.value)) in AT:
      self.keys.add(AT[group] + node.attr)
    self.generic_visit(node)


def test_every_key_is_read_somewhere_outside_the_config():
  read = set()
  for path in PACKAGE.rglob('*.py'):
    if path.name not in ('schema.py', 'limits.py', 'config.py'):
      text = path.read_text(encoding='utf-8')
      read |= Reads(ast.parse(text)).keys
      if 'getattr(sizes, axis)' in text:  # the one place that reads keys by name
        read |= {f'mesh.{axis}' for axis in ('pipe', 'data', 'node', 'local')}
  unread = sorted(set(FLAT) - read)
  assert not unread, f'parsed and ignored: {", ".join(unread)}'


def test_a_key_counts_as_read_only_on_a_value_known_to_be_its_group():
  text = """
from dsv3_jax import config
from dsv3_jax.config import Data

class Reader:
  def lengths(self):
    return self._batch.seq_len

  def __init__(self, c: config.Config, data: Data, other):
    m, self._batch = c.model, c.batch
    print(m.moe.top_k, data.workers, other.seed, m.nothing.dim, other.config.run.prompt)
"""
  keys = {'batch.seq_len', 'model.moe.top_k', 'data.workers', 'run.prompt'}
  assert Reads(ast.parse(text)).keys & set(FLAT) == keys
