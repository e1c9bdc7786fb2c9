"""The report as a program: a page that needs nothing else, the same as JSON, one line for every mistake."""

import html.parser
import json
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.codesign import __main__ as program
from dsv3_jax.codesign import report
from dsv3_jax.codesign.table import Chart, Row, Section, Table

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f'--config={ROOT}/configs/deepseek_v3_671b.py'


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.ids, self.used, self.loaded, self.open = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.open += [tag] if tag not in ('meta', 'br') else []
    for name, value in attrs:
      self.ids += [value] if name == 'id' else []
      if name in ('src', 'href', 'xlink:href'):
        (self.used if value.startswith('#') else self.loaded).append(value)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_whole_report_is_one_page_and_the_same_as_json(tmp_path, capsys):
  out = tmp_path / 'page.html'
  assert program.main(['report', CONFIG, '--hardware=h800', f'--out={out}']) == 0
  told = capsys.readouterr().out
  page = Page(out.read_text(encoding='utf-8'))
  assert not page.loaded and not page.open
  assert len(page.ids) == len(set(page.ids)) and {u[1:] for u in page.used} <= set(page.ids)
  values = json.loads((tmp_path / 'page.json').read_text(encoding='utf-8'))
  assert values['about'] == {'config': 'deepseek_v3_671b', 'hardware': 'h800'}
  assert len(values['sections']) == len(report.SECTIONS)
  rows = [
    row for tables in values['sections'].values() for table in tables.values() for row in table
  ]
  missed = [row for row in rows if row['agrees'] is False]
  assert missed and all(row['note'] for row in missed)
  assert sum(row['agrees'] is True for row in rows) > 100
  assert 'LLaMA-3.1 405B, of V3 is 7.344, printed 7.28: misprint' in told
  assert all(title in told for title in values['sections'])


def test_text_is_text_on_the_page_and_figures_do_not_share_ids():
  row = Row('a < b', 1.0, '<b>', '2', note='why & how')
  draw = lambda axes: axes.plot([1, 2])
  section = Section('T', 'x', (Table('t', (row,)),), (Chart('one', draw), Chart('two', draw)))
  text = report.to_html([section], {'config': '<script>'})
  assert '<script>' not in text and 'a &lt; b' in text and 'why &amp; how' in text
  page = Page(text)
  assert len(page.ids) == len(set(page.ids)) and page.used
  assert report.to_html([section], {}) == report.to_html([section], {})


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ([CONFIG, '--hardware=h80'], 'unknown; there are h800, h100'),
    ([CONFIG, '--trace=nowhere.npz'], 'nowhere.npz: cannot be read'),
    ([CONFIG, '--activations=nowhere.npz'], 'nowhere.npz: cannot be read'),
    ([CONFIG, '--out=page.txt'], '--out=page.txt: must be a file that ends in .html'),
    ([CONFIG, '--config.model.layers=3'], 'model.layers=3: no such key'),
    ([CONFIG, '--config.mesh.node=3'], 'model.moe.num_experts'),
    ([CONFIG, '--fast'], '--fast: not an argument'),
    ([], '--config'),
  ],
)
def test_mistakes_end_in_code_2_and_a_line(arguments, told, capsys):
  assert program.main(['report', *arguments]) == 2
  error = capsys.readouterr().err
  assert told in error and 'Traceback' not in error


def test_the_report_imports_no_jax():
  code = 'import sys, dsv3_jax.codesign.__main__; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0
