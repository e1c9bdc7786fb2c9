"""The server over a real socket, by the official client: answers and refusals."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import openai
import pytest


@pytest.fixture(scope='module')
def served(running):
  """A server that asks for a key."""
  with running('--body_bytes=20000', key='secret') as made:
    yield made


@pytest.fixture(scope='module')
def client(served):
  with openai.OpenAI(base_url=served.url + '/v1', api_key='secret', max_retries=0) as made:
    yield made


def test_64_at_once_get_what_each_gets_alone_streamed_or_not(served, client):
  def ask(i: int) -> str:
    how = {'model': 'small', 'prompt': f'p{i % 8}', 'max_tokens': 12, 'seed': i % 8}
    if i % 2:
      return client.completions.create(**how).choices[0].text
    parts = client.completions.create(**how, stream=True)
    return ''.join(part.choices[0].text for part in parts)

  alone = [ask(i) for i in range(8)]
  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    assert list(pool.map(ask, range(64))) == alone * 8
  assert len(set(alone)) == 8
  served.empty_soon()


def test_chat_has_usage_logprobs_choices_and_stops(client):
  how = {'model': 'small', 'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 10}
  whole = client.chat.completions.create(**how, n=2, logprobs=True, top_logprobs=3)
  assert [choice.index for choice in whole.choices] == [0, 1]
  assert whole.choices[0].message.content != whole.choices[1].message.content
  assert whole.usage.completion_tokens == 20
  for token in whole.choices[0].logprobs.content:
    assert len(token.top_logprobs) == 3 and token.logprob <= token.top_logprobs[0].logprob + 1e-6
  text = whole.choices[0].message.content
  stop = next(c for c in text if c != '\ufffd')
  stopped = client.chat.completions.create(**how, stop=[stop])
  assert stopped.choices[0].finish_reason == 'stop'
  assert stopped.choices[0].message.content == text[: text.index(stop)]
  parts = list(
    client.chat.completions.create(**how, stream=True, stream_options={'include_usage': True})
  )
  assert parts[-1].usage.completion_tokens == 10
  assert ''.join(p.choices[0].delta.content for p in parts[:-1]) == text
  assert parts[-2].choices[0].finish_reason == 'length'


def _post(url, body, key='secret', path='/v1/completions'):
  request = urllib.request.Request(url + path, body, {'authorization': f'Bearer {key}'})
  with pytest.raises(urllib.error.HTTPError) as error:
    urllib.request.urlopen(request, timeout=20)
  with error.value as answer:
    return answer.status, json.loads(answer.read())['error']['message']


@pytest.mark.parametrize(
  ('body', 'status', 'told'),
  [
    (b'{', 400, 'the body is not JSON'),
    (b'[' * 9000, 400, 'the body is not JSON'),
    (b'\xff', 400, 'the body is not JSON'),
    (b'[]', 400, 'the body must be a JSON object'),
    (b'{"prompt": "' + b'x' * 30_000, 413, 'the body has more than 20000 bytes'),
    (b'{"prompt": 3}', 400, 'prompt: must be one text'),
    (b'{"prompt": "\\ud800"}', 400, 'prompt: must be one text'),
    (b'{"prompt": [999]}', 400, 'prompt: token ids must be from 0 to'),
    (b'{"prompt": "a", "max_tokens": 0}', 400, 'max_tokens = 0: must be a whole number of 1 or more'),
    (b'{"prompt": "a", "temperature": NaN}', 400, 'temperature = nan'),
    (b'{"prompt": "a", "top_p": 0}', 400, 'top_p = 0.0: must be above 0'),
    (b'{"prompt": "a", "stop": ["", 1]}', 400, 'stop: must be a text or a list'),
    (b'{"prompt": "a", "echo": true}', 400, 'echo = True: is not served'),
    (b'{"prompt": "a", "beams": 2}', 400, 'beams: is not a parameter of completions'),
    (b'{"prompt": "a", "model": "big"}', 404, "model = 'big': this server has 'small'"),
    (b'{"prompt": "' + b'x' * 100 + b'"}', 400, 'prompt has 101 tokens: must have at least 1'),
  ],
)  # fmt: skip
def test_what_cannot_be_answered_gets_a_reason(served, body, status, told):
  got, message = _post(served.url, body)
  assert got == status and message.startswith(told)


def test_strangers_are_refused_and_health_and_metrics_are_open(served):
  assert _post(served.url, b'{"prompt": "a"}', key='wrong') == (
    401,
    'the API key is missing or wrong',
  )
  read = lambda path: urllib.request.urlopen(served.url + path, timeout=20).read().decode()
  assert json.loads(read('/health')) == {'status': 'ok'}
  assert 'dsv3_pages_owned 0\n' in read('/metrics') and 'status="401"' in read('/metrics')
  assert 'class="drafted"' in read('/')
