"""The report of an evaluation or a comparison: an html to read, a json to compute with."""

import base64
import html
import json
import math
import operator

from etils import epath
import numpy as np

from piflow_jax.evaluation import metrics

_CALLS = ("calls", "d", "network calls a sample; of a teacher, its steps")
_MODEL = {"model": ("model", "", ""), "calls": _CALLS}  # columns before the metrics: heading, format, what it says
_METHOD = {
    "method": ("method", "", ""),
    "calls": _CALLS,
    "seeds": ("seeds", "d", "trainings and sets of noises; figures read mean ± standard deviation over them"),
    "passes": ("passes", ".4g", "network passes a sample and training step, the teacher's counted"),
    "steps": ("steps", "d", "training steps"),
}
_MOST_DECIMALS = 4

_CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1f2933;--soft:#5d6978;--rule:#e1e5ea;--accent:#d9480f;
--tint:#fff1e8;--pass:#20793a;--fail:#c92a2a}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--text:#e6e9ed;--soft:#9aa5b1;--rule:#323942;
--accent:#ff8a4c;--tint:#33241b;--pass:#69c983;--fail:#ff8787}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:8px 0}
h2{font-size:1.1rem;margin:32px 0 10px}
section,figure{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px;margin:0 0 16px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
tr:last-child td{border-bottom:0}
th{font-size:.8rem;font-weight:600;color:var(--soft);vertical-align:bottom}
.results th{white-space:normal}
.results .group th{padding-top:18px;color:var(--text)}
.results b{color:var(--accent)}
main:has(.group){max-width:1400px}
th:first-child,td:first-child{text-align:left}
.student td{background:var(--tint)}
.student td:first-child{color:var(--accent);font-weight:700}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:0 16px;align-items:start}
.pair td:first-child,.settings td{white-space:normal;overflow-wrap:anywhere}
ul{list-style:none;margin:0;padding:0}
.checks li{display:flex;gap:12px;padding:8px 0;border-bottom:1px solid var(--rule)}
.checks li:last-child{border-bottom:0}
.checks b{flex:none;width:4.6em}
.checks small{display:block}
.passed{color:var(--pass)}.failed{color:var(--fail)}
small,figcaption,.notes{color:var(--soft);font-size:.86rem}
figcaption{margin-bottom:10px;color:var(--text);font-weight:600;font-size:.95rem}
figure div{background:#fff;border-radius:8px;padding:8px;overflow-x:auto}
figure img{display:block;margin:0 auto;max-width:100%;height:auto;min-width:min(100%,560px)}
.notes li+li{margin-top:6px}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);font-size:.86rem}
@media(max-width:640px){figure img{max-width:none;width:640px}}
"""


def _plain(value):
  """What JSON can say: numpy's numbers as Python's, and null for what is no finite number."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [_plain(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value, form=".4g"):
  """A plain value as escaped text, a dash for None."""
  if value is None:
    return "–"
  if isinstance(value, list):
    return ", ".join(_text(v, form) for v in value)
  if isinstance(value, (bool, str)) or not form or (isinstance(value, int) and form != "d"):
    return html.escape(str(value))
  return format(int(value) if form == "d" else value, form)


def _results(columns, keys, body):
  """The table of `body`, rows as html, under columns {key: (heading, format, what it says)} and those of metrics."""
  said = [(name, note) for name, _, note in columns.values()]
  said += [(metrics.heading(key), metrics.note(key)) for key in keys]
  head = "".join(f'<th title="{html.escape(note)}">{html.escape(name)}</th>' for name, note in said)
  notes = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(note)}</li>" for name, note in said if note)
  return (f'<h2>Results</h2><section><div class="wide"><table class="results"><thead><tr>{head}</tr></thead>'
          f"{body}</table></div><details><summary>What the columns say</summary>"
          f'<ul class="notes">{notes}</ul></details></section>')


def _decimals_of_columns(rows):
  """{metric: its column's decimals}, of the metrics that any of `rows`, dicts {metric: value}, has."""
  columns = {key: [row.get(key) for row in rows] for key in metrics.METRICS}
  return {key: _decimals(values, key) for key, values in columns.items() if any(v is not None for v in values)}


def _evaluated(rows):
  decimals = _decimals_of_columns(rows)
  body = ""
  for row in rows:
    cells = [_text(row.get(name), form) for name, (_, form, _) in _MODEL.items()]
    cells += [_text(row.get(key), f".{digits}f") for key, digits in decimals.items()]
    body += (f'<tr class="{"student" if row.get("model") == "student" else "teacher"}">'
             + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
  return _results(_MODEL, decimals, f"<tbody>{body}</tbody>")


def _with_means(row):
  """The plain row with `mean` and `std` over its seeds."""
  seeds = len(row["seeds"])
  if any(len(values) != seeds for values in row["values"].values()):
    raise ValueError(f"{row['method']}, {row['calls']} calls: every metric needs a value for each of {seeds} seeds, "
                     f"got {({k: len(v) for k, v in row['values'].items()})}")
  found = {key: metrics.over_seeds(values) for key, values in row["values"].items()}
  return row | {"mean": {key: mean for key, (mean, _) in found.items()},
                "std": {key: std for key, (_, std) in found.items()}}


def _decimals(values, key):
  """Decimals of a metric's column: three significant digits of the smallest value, but not below the metric's least."""
  least, sizes = metrics.METRICS[key].decimals, [abs(value) for value in values if value]
  return min(max(least, math.ceil(-math.log10(min(sizes))) + 2), _MOST_DECIMALS) if sizes else least


def _best(rows, key, decimals, goal):
  """Indices of the rows that are best by their mean; `goal` is the teacher's, or None."""
  better = metrics.METRICS[key].better
  if better == metrics.TEACHERS and goal is None:
    return []
  # Without the seeds that failed, a mean flatters: such rows do not compete.
  means = {i: row["mean"][key] for i, row in enumerate(rows) if None not in row["values"].get(key, [None])}
  if better == metrics.HIGHER:
    means = {i: -mean for i, mean in means.items()}
  elif better == metrics.TEACHERS:
    means = {i: abs(mean - goal) for i, mean in means.items()}
  elif better == metrics.FASTER:
    # Clocks differ from run to run: what reads alike is alike, and then nobody is faster.
    means = {i: round(mean, decimals) for i, mean in means.items()}
  best = [i for i, value in means.items() if value == min(means.values())]
  return [] if better == metrics.FASTER and len(best) > 1 else best


def _mean_and_std(row, key, decimals):
  mean, std = row["mean"].get(key), row["std"].get(key)
  if mean is None:
    return "–"
  known, seeds = sum(v is not None for v in row["values"][key]), len(row["seeds"])
  return (f"{mean:.{decimals}f}" + ("" if std is None else f" ± {std:.{decimals}f}")
          + (f" ({known} of {seeds})" if known < seeds else ""))


def _compared(rows):
  """The table: the teacher's rows, then the methods' by number of calls, the best of each number bold."""
  teacher = sorted((row for row in rows if row["method"] == "teacher"), key=operator.itemgetter("calls"))
  methods = [row for row in rows if row["method"] != "teacher"]
  goal = teacher[-1]["mean"] if teacher else {}
  decimals = _decimals_of_columns([row["mean"] for row in rows])
  groups = [("teacher", "teacher", teacher)] if teacher else []
  for calls in sorted({row["calls"] for row in methods}):
    groups.append(("method", f"{calls} call{'s' if calls != 1 else ''}", [r for r in methods if r["calls"] == calls]))
  body, width = "", len(_METHOD) + len(decimals)
  for kind, heading, group in groups:
    body += f'<tbody><tr class="group"><th colspan="{width}" scope="colgroup">{heading}</th></tr>'
    best = {m: _best(group, m, d, goal.get(m)) if kind == "method" else [] for m, d in decimals.items()}
    for i, row in enumerate(group):
      shown = row | {"seeds": len(row["seeds"])}
      cells = [_text(shown[key], form) for key, (_, form, _) in _METHOD.items()]
      for key, digits in decimals.items():
        cell = _mean_and_std(row, key, digits)
        cells.append(f"<b>{cell}</b>" if i in best[key] else cell)
      body += f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    body += "</tbody>"
  return _results(_METHOD, decimals, body)


def _checks(checks):
  if not checks:
    return ""
  failed = sum(not c["passed"] for c in checks)
  summary = f"{failed} of {len(checks)} failed" if failed else f"all {len(checks)} passed"
  items = ""
  for check in checks:
    name, mark = ("passed", "✓ pass") if check["passed"] else ("failed", "✗ fail")
    items += (f'<li><b class="{name}">{mark}</b><span>{_text(check["text"])}<small>measured {_text(check["value"])}, '
              f'bound {_text(check["bound"])}</small></span></li>')
  return (f'<h2>Checks: <span class="{"failed" if failed else "passed"}">{summary}</span></h2>'
          f'<section><ul class="checks">{items}</ul></section>')


def _numbers(title, numbers, form):
  if not numbers:
    return ""
  rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{_text(v, form)}</td></tr>" for k, v in numbers.items())
  return f"<div><h2>{title}</h2><section><table>{rows}</table></section></div>"


def _flat(settings, prefix=""):
  """Nested dicts as one, with names joined by dots."""
  flat = {}
  for key, value in settings.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return flat


def _notes(notes):
  items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
  return f'<div><h2>Notes</h2><section><ul class="notes">{items}</ul></section></div>' if notes else ""


def _pictures(pictures):
  """Figures of a dict caption -> PNG bytes, under a heading."""
  figures = ""
  for caption, png in pictures.items():
    caption = html.escape(caption)
    figures += (f'<figure><figcaption>{caption}</figcaption><div><img alt="{caption}" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div></figure>')
  return f"<h2>Pictures</h2>{figures}" if pictures else ""


def _write(path, text):
  temporary = path.parent / f"{path.name}.tmp"
  temporary.write_text(text)
  temporary.replace(path)


def _save(folder, name, title, data, body):
  """Write `data` as name.json and the page of `body`, pieces of html, as name.html; returns the page's epath.Path."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  title = html.escape(title)
  page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f"<title>{title}</title><style>{_CSS}</style></head>"
          f"<body><main><h1>{title}</h1>{''.join(body)}</main></body></html>\n")
  _write(folder / f"{name}.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
  _write(folder / f"{name}.html", page)
  return folder / f"{name}.html"


def write_report(folder, *, title, rows, settings, notes, minutes, reference, pictures, checks):
  """Write report.html, which needs no other file, and report.json; each appears whole or not at all.

  Args:
    folder: made if need be.
    title: text.
    rows: list of dicts {model, calls, metric: value}, a row for each model and number of calls; values may be None.
      A metric that no row has gets no column.
    settings: dict name -> value, or another such dict: how was drawn and measured.
    notes: list of texts.
    minutes: dict stage -> minutes it took.
    reference: dict name in words -> number to compare the rows with.
    pictures: dict caption -> PNG bytes.
    checks: list of (text, value, bound, passed).
  Returns:
    epath.Path of report.html.
  """
  checks = [dict(zip(("text", "value", "bound", "passed"), check, strict=True)) for check in checks]
  data = _plain({"rows": rows, "settings": settings, "notes": notes, "minutes": minutes, "reference": reference,
                 "checks": checks})
  return _save(folder, "report", title, data, [
      _checks(data["checks"]),
      _evaluated(data["rows"]),
      _pictures(pictures),
      '<div class="pair settings">',
      _numbers("Reference", data["reference"], ".4g"),
      _numbers("Settings", _flat(data["settings"]), ".4g"),
      _numbers("Minutes", data["minutes"], ".1f"),
      _notes(data["notes"]),
      "</div>",
  ])


def write_comparison(folder, *, title, rows, settings, notes, pictures):
  """Write compare.html, which needs no other file, and compare.json; each appears whole or not at all.

  Args:
    folder: made if need be.
    title: text.
    rows: list of dicts {method, calls, seeds: [int], passes, steps, values: {metric: [a value a seed]}}, a row for each
      method and number of calls; the method "teacher" is what the others imitate. passes (network passes a sample and
      training step), steps and values may be None; a metric that no row has gets no column. compare.json adds the
      dicts mean and std (the sample's, None for one seed).
    settings: dict name -> value, or another such dict.
    notes: list of texts.
    pictures: dict caption -> PNG bytes.
  Returns:
    epath.Path of compare.html.
  Raises:
    ValueError: a metric without one value a seed.
  """
  rows = [_with_means(row) for row in _plain(rows)]
  data = {"rows": rows, "settings": _plain(settings), "notes": _plain(notes)}
  return _save(folder, "compare", title, data, [
      _compared(data["rows"]),
      _pictures(pictures),
      '<div class="pair settings">',
      _numbers("Settings", _flat(data["settings"]), ".4g"),
      _notes(data["notes"]),
      "</div>",
  ])
