"""The co-design report: sections in one tuple; as a page, as JSON and for the terminal.

A section is a function (config, hardware) -> Section. The page is one file with nothing to load: figures
are SVG inside it, and it reads at any width.
"""

import dataclasses
import html
import io
import json
import zlib
from collections.abc import Callable
from typing import Any

import matplotlib
import rich.box
import rich.console
import rich.table
from matplotlib.figure import Figure

from dsv3_jax import config
from dsv3_jax.codesign import (
  accumulation_study,
  compute,
  cost,
  decode_limit,
  expert_traffic,
  host,
  local,
  logfmt_study,
  memory,
  network,
  schedule,
  step_time,
  what_if,
)
from dsv3_jax.codesign.branches import Branches
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section
from dsv3_jax.parallel.trace import Trace

SECTIONS: tuple[Callable[[config.Config, Hardware], Section], ...] = (
  memory.section,
  compute.section,
  network.topologies,
  network.traffic,
  network.failures,
  network.latencies,
  expert_traffic.section,
  decode_limit.section,
  local.section,
  host.section,
  what_if.section,
  schedule.section,
  step_time.section,
  cost.section,
  logfmt_study.section,
  accumulation_study.section,
)

STYLE = {
  'font.family': 'DejaVu Sans', 'font.size': 9, 'svg.hashsalt': 'dsv3_jax',
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#6b7785',
  'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e4e7eb', 'grid.linewidth': 0.6,
  'legend.frameon': False,
}  # fmt: skip


def make(
  c: config.Config,
  hardware: Hardware,
  trace: Trace | None = None,
  activations: Branches | None = None,
) -> list[Section]:
  """All sections; raises ValueError, one line, for a trace or sizes that cannot be."""
  extra = {
    expert_traffic.section: {'trace': trace},
    logfmt_study.section: {'activations': activations},
  }
  return [make_section(c, hardware, **extra.get(make_section, {})) for make_section in SECTIONS]


# ---- JSON and terminal ---------------------------------------------------------------------------


def to_json(sections: list[Section], about: dict[str, str]) -> str:
  values: dict[str, Any] = {'about': about, 'sections': {}}
  for s in sections:
    values['sections'][s.title] = {
      t.title: [dataclasses.asdict(row) | {'agrees': row.agrees} for row in t.rows]
      for t in s.tables
    }
  return json.dumps(values, indent=1, default=float) + '\n'


def show(sections: list[Section], console: rich.console.Console) -> None:
  for s in sections:
    console.print(f'\n[bold]{s.title}[/bold]\n{s.text}', highlight=False)
    for t in s.tables:
      printed = any(row.published is not None for row in t.rows)
      table = rich.table.Table(title=t.title, title_justify='left', box=rich.box.SIMPLE_HEAD)
      table.add_column('', overflow='fold')
      table.add_column('here', justify='right')
      table.add_column('')
      if printed:
        table.add_column('printed', justify='right')
      table.add_column('', overflow='fold', style='dim')
      for row in t.rows:
        given = [_published(row)] if printed else []
        table.add_row(row.label, row.text, row.unit, *given, row.note)
      console.print(table, highlight=False)


def misses(sections: list[Section]) -> list[tuple[str, Row]]:
  """Rows that have not the digits printed, with their section; each must say why."""
  return [
    (s.title, row) for s in sections for t in s.tables for row in t.rows if row.agrees is False
  ]


def _published(row: Row) -> str:
  if row.published is None:
    return ''
  return f'{row.published} {"=" if row.agrees else "differs"}'


# ---- page ----------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 0 16px 48px; color: #1f2933; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }
h1 { font-size: 1.6rem; margin: 24px 0 4px; }
h2 { font-size: 1.3rem; margin: 44px 0 4px; padding-top: 10px; border-top: 2px solid #1f2933; }
h3 { font-size: 0.95rem; margin: 0; padding: 14px 0 4px; }
p { max-width: 72ch; margin: 4px 0 12px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 12px 0; }
a { color: #2f6db5; }
.parts { columns: 2 440px; column-gap: 36px; }
.part, .parts figure { break-inside: avoid; }
figure { margin: 0; padding: 14px 0 6px; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
th { font-weight: 400; color: #6b7785; text-align: right; padding: 2px 0 2px 8px; }
td { padding: 3px 0 3px 8px; border-top: 1px solid #e4e7eb; vertical-align: top; }
td:first-child, th:first-child { padding-left: 0; text-align: left; overflow-wrap: anywhere; }
td.value, td.printed { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { text-align: right; }
td.unit { color: #6b7785; white-space: nowrap; font-size: 0.8rem; }
.note { color: #6b7785; font-size: 0.8rem; line-height: 1.35; }
.yes { color: #2b7a5b; } .no { color: #b03a3a; }
@media (max-width: 560px) { body { padding: 0 12px 32px; font-size: 14px; }
  td.unit { white-space: normal; max-width: 5.5em; } }
"""


def to_html(sections: list[Section], about: dict[str, str]) -> str:
  """The page; `about` stands at its top, what and which."""
  e = html.escape
  rows = [row for s in sections for t in s.tables for row in t.rows if row.published is not None]
  met = sum(bool(row.agrees) for row in rows)
  title = ', '.join(about.values())
  words = ' &middot; '.join(f'{e(key)}: {e(value)}' for key, value in about.items())
  links = ''.join(f'<a href="#s{i}">{e(s.title)}</a>' for i, s in enumerate(sections))
  body = ''.join(_section(f's{i}', s) for i, s in enumerate(sections))
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>Co-design: {e(title)}</title><style>{_CSS}</style></head><body>'
    f'<h1>From hardware to model</h1><p>{words}<br>{met} of {len(rows)} figures that were published have '
    'their printed digits here, rounded or cut; the others say how far off they are, or why.</p>'
    f'<nav>{links}</nav>{body}</body></html>\n'
  )


def _section(anchor: str, s: Section) -> str:
  e = html.escape
  tables = ''.join(
    f'<div class="part"><h3>{e(t.title)}</h3>{_table(t.rows)}</div>' for t in s.tables
  )
  figures = ''.join(_figure(chart) for chart in s.charts)
  return (
    f'<section id="{anchor}"><h2>{e(s.title)}</h2><p>{e(s.text)}</p>'
    f'<div class="parts">{figures}{tables}</div></section>'
  )


def _table(rows: tuple[Row, ...]) -> str:
  e = html.escape
  printed = any(row.published is not None for row in rows)
  head = '<tr><th></th><th>here</th><th></th><th>printed</th></tr>' if printed else ''
  cells = []
  for row in rows:
    note = f'<div class="note">{e(row.note)}</div>' if row.note else ''
    given = ''
    if printed:
      mark = {
        None: '',
        True: ' <span class="yes">&#10003;</span>',
        False: ' <span class="no">&#8800;</span>',
      }
      given = f'<td class="printed">{e(row.published or "")}{mark[row.agrees]}</td>'
    kind = 'text' if isinstance(row.value, str) else 'value'
    cells.append(
      f'<tr><td>{e(row.label)}{note}</td><td class="{kind}">{e(row.text)}</td>'
      f'<td class="unit">{e(row.unit)}</td>{given}</tr>'
    )
  return f'<table>{head}{"".join(cells)}</table>'


def _figure(chart: Chart) -> str:
  caption = html.escape(chart.title)
  return f'<figure><figcaption>{caption}</figcaption>{svg(chart)}</figure>'


def svg(chart: Chart) -> str:
  """The element alone, without what a file has around it; letters are shapes, so no font is needed."""
  with matplotlib.rc_context(STYLE):
    figure = Figure((chart.width, chart.height), layout='constrained')
    chart.draw(figure.subplots())
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None})
  text = out.getvalue()
  # Ids are per figure in matplotlib; a page has many.
  name = f'f{zlib.crc32(chart.title.encode()):x}'
  text = text[text.index('<svg') :]
  return (
    text.replace('id="', f'id="{name}-').replace('"#', f'"#{name}-').replace('(#', f'(#{name}-')
  )
