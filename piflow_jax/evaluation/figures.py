"""Pictures of samples and numbers, as arrays or PNG bytes; matplotlib's objects only, so no state outlives a call."""

import io
import textwrap

import numpy as np
from scipy import ndimage

from piflow_jax import images
from piflow_jax.evaluation import metrics as metrics_lib

_TEACHER, _STUDENT, _TEXT, _RULE = "#8a94a3", "#d9480f", "#1f2933", "#d5dae1"
_COLOURS = ("#1c6dd0", "#d9480f", "#2b8a3e", "#7048c6", "#b08900", "#0b8a8f", "#c2255c", "#5c4033")
_MARKERS = "osD^vP*X<"  # one more than colours, so that pairs do not repeat before 72
_DPI = 100
_QUALITY = ("frechet", "endpoint_error")


def _figure(width, height):
  """A white matplotlib figure of width x height pixels."""
  from matplotlib import figure  # only those who draw need matplotlib

  return figure.Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def _png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=_DPI)
  return buffer.getvalue()


def _bare(axes):
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(_RULE)
  axes.tick_params(colors=_TEXT, color=_RULE, labelsize=9, which="both")


def _titled(axes, title, xlabel, ylabel, size=12):
  axes.set_title(title, loc="left", fontsize=size, color=_TEXT, parse_math=False)
  axes.set_xlabel(xlabel, color=_TEXT, parse_math=False)
  axes.set_ylabel(ylabel, color=_TEXT, parse_math=False)
  axes.grid(axis="y", color=_RULE, linewidth=0.6, alpha=0.6)
  _bare(axes)


def _wrapped(title):
  """A panel's title in lines as wide as the panel: matplotlib would write it over the next one's."""
  return textwrap.fill(title, 40)


def _points(x, y, log):
  """x and y as floats, without points that are not finite or, on an axis named in `log`, not positive."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  kept = np.isfinite(x) & np.isfinite(y) & ((x > 0) | ("x" not in log)) & ((y > 0) | ("y" not in log))
  return x[kept], y[kept]


def _log(axis, values=()):
  """Make an axis that has its data logarithmic, with plain numbers at `values` if these are few, else at round ones."""
  from matplotlib import ticker

  axis.axes.set(**{f"{axis.axis_name}scale": "log"})
  if axis.get_view_interval()[0] <= 0:  # no data yet
    axis.axes.set(**{f"{axis.axis_name}lim": (1, 10)})
  low, high = axis.get_view_interval()
  values = np.unique(values)
  if 0 < len(values) <= 8:
    far = [values[0]]
    for value in values[1:]:
      if np.log(value / far[-1]) > 0.12 * np.log(high / low):  # labels of nearer ticks would touch
        far.append(value)
    axis.set_major_locator(ticker.FixedLocator(far))
  elif high / low < 3:
    axis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10)))
  else:
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_locator(ticker.NullLocator())


def _legend(figure, handles, place):
  """One legend for all panels, "upper" or "lower", of as many columns as fit; returns how many rows it has."""
  names = [handle.get_label() for handle in handles]
  columns = max(int(figure.get_figwidth() * _DPI) // (60 + 7 * max(map(len, names))), 1)
  legend = figure.legend(handles, names, loc=f"outside {place} left", ncols=columns, frameon=False, fontsize=9,
                         labelcolor=_TEXT)
  for text in legend.get_texts():
    text.set_parse_math(False)
  return -(-len(names) // columns)


def comparison(rows, *, cell=48):
  """One row a model, one column a noise, pixels kept crisp.

  Args:
    rows: list of (label, x_0 that `images.shows`, [n, ...] in [-1, 1]), all of one shape.
    cell: of `images.image_grid`.
  Returns:
    PNG bytes.
  Raises:
    ValueError: no rows, or rows of different shapes.
  """
  if not rows or len({np.shape(x_0) for _, x_0 in rows}) > 1:
    raise ValueError(f"rows must hold images of one shape, got {[np.shape(x_0) for _, x_0 in rows]}")
  columns, gap = len(rows[0][1]), 6
  grid = images.image_grid(np.concatenate([x_0 for _, x_0 in rows]), columns, cell=cell)
  step = (len(grid) + 1) // len(rows)
  label_width = 24 + 8 * max(len(label) for label, _ in rows)
  width, height = label_width + grid.shape[1], len(rows) * (step - 1 + gap) - gap
  figure = _figure(width, height)
  for i, (label, _) in enumerate(rows):
    bottom = (len(rows) - 1 - i) * (step - 1 + gap)
    # An axes would resample the pixels; figimage copies them.
    figure.figimage(grid[i * step:(i + 1) * step - 1], label_width, bottom)
    figure.text((label_width - 12) / width, (bottom + step / 2) / height, label, ha="right", va="center", fontsize=10,
                color=_TEXT, parse_math=False)
  return _png(figure)


def curves(series, title, ylabel, log=True):
  """Values over steps, each as a light line with its running mean over a fiftieth of its length.

  Args:
    series: dict name -> (steps [n], values [n]); values that are not finite are left out.
    title, ylabel: texts.
    log: logarithmic values, without those that are not positive.
  Returns:
    PNG bytes.
  """
  figure = _figure(860, 400)
  axes = figure.add_subplot()
  for i, (name, (steps, values)) in enumerate(series.items()):
    steps, values = _points(steps, values, "y" if log else "")
    colour = _COLOURS[i % len(_COLOURS)]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    smooth = ndimage.uniform_filter1d(values, max(len(values) // 50, 1), mode="nearest")
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
  _titled(axes, title, "step", ylabel)
  if log:
    _log(axes.yaxis)
  if series:
    axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
  figure.set_layout_engine("tight")
  return _png(figure)


def lines(panels, title):
  """Panels side by side, a line for each series, with markers if its points are few; a name looks alike in all panels.

  Args:
    panels: list of (title, xlabel, ylabel, {name: (x [n], y [n])}, log), log the logarithmic axes: "", "x", "y" or
      "xy". Points without a finite value, or without a positive one where it is logarithmic, are left out.
    title: text over all panels.
  Returns:
    PNG bytes, 400 pixels high, 860 wide or 340 a panel where that is more.
  Raises:
    ValueError: no panels, or a log of other letters.
  """
  if not panels or any(set(log) - set("xy") for *_, log in panels):
    raise ValueError(f'lines need panels with log "", "x", "y" or "xy", got {[log for *_, log in panels]}')
  figure = _figure(max(860, 340 * len(panels)), 400)
  figure.set_layout_engine("constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_TEXT, parse_math=False)
  handles = {}
  for axes, (heading, xlabel, ylabel, series, log) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
    ticks = []
    for name, (x, y) in series.items():
      x, y = _points(x, y, log)
      i = list(handles).index(name) if name in handles else len(handles)
      line, = axes.plot(x, y, color=_COLOURS[i % len(_COLOURS)], linewidth=1.8, label=name, markersize=6,
                        marker=_MARKERS[i % len(_MARKERS)] if len(x) <= 20 else None)
      handles.setdefault(name, line)
      ticks.extend(x)
    _titled(axes, _wrapped(heading), xlabel, ylabel, size=10.5)
    if "x" in log:
      _log(axes.xaxis, ticks)
    if "y" in log:
      _log(axes.yaxis)
  if handles:
    _legend(figure, list(handles.values()), "lower")
  return _png(figure)


def _limits(values, others):
  """Limits of a logarithmic axis that shows all values, and the others if these take half of it at most."""
  values = [v for v in values if v > 0] or [1]
  low, high = min(values), max(values)
  span = max(high / low, 1.1)
  near = [np.clip(v, low / span, high * span) for v in others if v > 0]
  low, high = min([low, *near]), max([high, *near])
  margin = max((high / low) ** 0.08, 1.05)
  return low / margin, high * margin


def methods(rows, metrics, titles):
  """Small multiples: a panel a metric, network calls from left to right, a line with error bars for each method.

  Args:
    rows: of `report.write_comparison`: points are means over the seeds that have a value, bars sample standard
      deviations. The method "teacher" is a dashed grey line over the calls of the others, which may leave a panel
      where the others would shrink to a stripe, and a horizontal grey line at its most calls.
    metrics: keys of the rows' values, two panels a row; axes are logarithmic, without what is not positive.
    titles: of the panels.
  Returns:
    PNG bytes, 860 pixels wide, 240 high for each row of panels and 20 for each row of the legend.
  Raises:
    ValueError: no rows but the teacher's, no metrics, or not a title for each.
  """
  values = {(row["method"], row["calls"]): row["values"] for row in rows}
  if all(name == "teacher" for name, _ in values) or not metrics or len(metrics) != len(titles):
    raise ValueError(f"need rows of methods, and metrics with a title each; got {list(values)}, {metrics} and {titles}")
  calls = sorted({n for name, n in values if name != "teacher"})
  figure = _figure(860, 240 * -(-len(metrics) // 2))
  figure.set_layout_engine("constrained")
  panels = figure.subplots(-(-len(metrics) // 2), 2).ravel()
  for axes in panels[len(metrics):]:
    axes.remove()
  for axes, metric, title in zip(panels, metrics, titles):
    handles = _by_calls(axes, {key: found.get(metric, []) for key, found in values.items()}, calls)
    _titled(axes, _wrapped(title), "", "", size=10.5)
    axes.set_xlim(-0.5, len(calls) - 0.5)
    axes.set_xticks(range(len(calls)), calls)
  for axes in panels[:len(metrics)][-2:]:
    axes.set_xlabel("network calls a sample", color=_TEXT)
  figure.set_figheight(figure.get_figheight() + 20 * _legend(figure, handles, "upper") / _DPI)
  return _png(figure)


def _over_calls(values, name, calls):
  """Means and deviations over seeds, [calls] each, for {(method, calls): values}; NaN and 0 where there are too few."""
  found = [metrics_lib.over_seeds(values.get((name, n), [])) for n in calls]
  mean = np.array([np.nan if mean is None else mean for mean, _ in found])
  return mean, np.array([std or 0.0 for _, std in found])


def _by_calls(axes, values, calls):
  """Draw {(method, calls): a value a seed} into a panel and scale its axis; returns the legend's handles."""
  names = list(dict.fromkeys(name for name, _ in values if name != "teacher"))
  finest = max((n for name, n in values if name == "teacher"), default=None)
  handles, reach, teacher = [], [], []
  if finest is not None:
    goal, _ = _over_calls(values, "teacher", [finest])
    teacher, _ = _over_calls(values, "teacher", calls)
    handles += axes.plot(teacher, "--", color=_TEACHER, linewidth=1.6, label="teacher")
    handles.append(axes.axhline(goal[0], color=_TEACHER, linewidth=1.6, label=f"teacher, {finest} calls"))
    reach += [*goal]
  for i, name in enumerate(names):
    mean, std = _over_calls(values, name, calls)
    # Side by side, or the bars of methods that are alike would cover one another.
    x = np.arange(len(calls)) + 0.56 * ((i + 0.5) / len(names) - 0.5)
    handles.append(axes.errorbar(
        x, mean, std, color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], markersize=5.5,
        linewidth=1, elinewidth=1.4, capsize=2.5, label=name))
    # A bar may reach below zero, where a logarithmic axis has no place.
    reach += [*np.maximum(mean - std, mean / 2), *(mean + std)]
  axes.set_ylim(*_limits(reach, teacher))
  _log(axes.yaxis)
  if not np.any(np.greater(reach, 0)):
    axes.set_yticks([])
  return handles


def quality(rows):
  """Bars of `frechet` and `endpoint_error` for rows of `report.write_report`, a dash where there is none; PNG bytes.

  One that no row has gets no panel.
  """
  figure = _figure(860, 90 + 34 * len(rows))
  names = [f"{r['model']}, {r['calls']} call{'s' if r['calls'] != 1 else ''}" for r in rows]
  colours = [_STUDENT if r["model"] == "student" else _TEACHER for r in rows]
  keys = [key for key in _QUALITY if any(row.get(key) is not None for row in rows)] or _QUALITY
  panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
  for axes, key in zip(panels, keys):
    values = [float("nan") if r.get(key) is None else float(r[key]) for r in rows]
    shown = np.isfinite(values)
    bars = axes.barh(range(len(rows)), np.where(shown, values, 0), color=colours, height=0.66)
    axes.bar_label(bars, [f"{v:.3g}" if s else "–" for v, s in zip(values, shown)], padding=4, fontsize=9, color=_TEXT)
    axes.set_title(_wrapped(f"{metrics_lib.METRICS[key].title} (lower is better)"), loc="left", fontsize=10.5,
                   color=_TEXT)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlim(0, 1.18 * max([v for v, s in zip(values, shown) if s], default=1) or 1)
    axes.set_xticks([])
    _bare(axes)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
  panels[0].invert_yaxis()
  figure.set_layout_engine("tight")
  return _png(figure)
