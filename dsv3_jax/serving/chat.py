"""Messages to a prompt, by a Jinja template that runs in a sandbox.

A template comes with weights from elsewhere: it sees the messages and can neither change them nor reach
anything else. Without one a conversation is written as a plain transcript, which any model can go on with.
The result is encoded as text: special tokens that a template spells are text, so nobody can inject one.
"""

from collections.abc import Callable, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.config import ConfigError

_TRANSCRIPT = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}'
  '{% if add_generation_prompt %}assistant:{% endif %}'
)
Render = Callable[[Sequence[dict[str, str]]], str]


def renderer(template: str | None) -> Render:
  """Raises ConfigError for one that is no Jinja; the result raises jinja2.TemplateError."""
  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  try:
    compiled = environment.from_string(template or _TRANSCRIPT)
  except jinja2.TemplateError as error:
    raise ConfigError(f'chat_template: is not a Jinja template: {error}') from None
  return lambda messages: compiled.render(messages=messages, add_generation_prompt=True)
