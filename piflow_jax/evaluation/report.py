"""The report of an evaluation: report.html to read, report.json to compute with."""

import base64
import html
import json
import math

from etils import epath
import numpy as np

_COLUMNS = {  # key of a row: heading, format, what it says
    "model": ("model", "", ""),
    "calls": ("calls", "d", "network calls a sample"),
    "frechet": ("Fréchet ↓", ".3f", "Fréchet distance of features to those of real samples; lower is better"),
    "frechet_to_teacher": ("Fréchet to teacher ↓", ".3f", "the same to the many-step teacher's samples"),
    "precision": ("precision ↑", ".3f", "share of samples that lie among real ones"),
    "recall": ("recall ↑", ".3f", "share of real samples that lie among generated ones"),
    "accuracy": ("accuracy ↑", ".3f", "share of samples that a classifier reads as the class asked for"),
    "diversity": ("diversity", ".3f",
                  "mean rms difference of two samples of one class; the many-step teacher's is the goal"),
    "endpoint_error": ("endpoint error ↓", ".3f",
                       "rms distance from the many-step teacher's sample of the same noise; 1 = unrelated samples"),
    "seconds_per_1000": ("s / 1000", ".3g", "seconds for 1000 samples"),
}

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
th:first-child,td:first-child{text-align:left}
.student td{background:var(--tint)}
.student td:first-child{color:var(--accent);font-weight:700}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:0 16px;align-items:start}
.pair td:first-child{white-space:normal;overflow-wrap:anywhere}
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
  if isinstance(value, (bool, str)) or not form or (isinstance(value, int) and form != "d"):
    return html.escape(str(value))
  return format(int(value) if form == "d" else value, form)


def _results(rows):
  head = "".join(f'<th title="{html.escape(note)}">{html.escape(name)}</th>' for name, _, note in _COLUMNS.values())
  body = ""
  for row in rows:
    cells = "".join(f"<td>{_text(row.get(key), form)}</td>" for key, (_, form, _) in _COLUMNS.items())
    body += f'<tr class="{"student" if row.get("model") == "student" else "teacher"}">{cells}</tr>'
  notes = "".join(
      f"<li><b>{html.escape(name)}</b>: {html.escape(note)}</li>" for name, _, note in _COLUMNS.values() if note)
  return (f'<h2>Results</h2><section><div class="wide"><table class="results"><thead><tr>{head}</tr></thead>'
          f"<tbody>{body}</tbody></table></div><details><summary>What the columns say</summary>"
          f'<ul class="notes">{notes}</ul></details></section>')


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


def _picture(caption, png):
  caption = html.escape(caption)
  return (f'<figure><figcaption>{caption}</figcaption><div><img alt="{caption}" '
          f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div></figure>')


def _write(path, text):
  temporary = path.parent / f"{path.name}.tmp"
  temporary.write_text(text)
  temporary.replace(path)


def write_report(folder, *, title, rows, minutes, reference, pictures, checks):
  """Write report.html, which needs no other file, and report.json; each appears whole or not at all.

  Args:
    folder: made if need be.
    title: text.
    rows: list of dicts {model, calls, frechet, frechet_to_teacher, precision, recall, accuracy, diversity,
      endpoint_error, seconds_per_1000}, a row for each model and number of calls; values may be None.
    minutes: dict stage -> minutes it took.
    reference: dict name -> number to compare the rows with.
    pictures: dict caption -> PNG bytes.
    checks: list of (text, value, bound, passed).
  Returns:
    epath.Path of report.html.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  checks = [dict(zip(("text", "value", "bound", "passed"), check, strict=True)) for check in checks]
  data = _plain({"rows": rows, "minutes": minutes, "reference": reference, "checks": checks})
  body = [
      f"<h1>{html.escape(title)}</h1>",
      _checks(data["checks"]),
      _results(data["rows"]),
      "<h2>Pictures</h2>" if pictures else "",
      *(_picture(caption, png) for caption, png in pictures.items()),
      '<div class="pair">',
      _numbers("Reference", data["reference"], ".4g"),
      _numbers("Minutes", data["minutes"], ".1f"),
      "</div>",
  ]
  page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>"
          f"<body><main>{''.join(body)}</main></body></html>\n")
  _write(folder / "report.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
  _write(folder / "report.html", page)
  return folder / "report.html"
