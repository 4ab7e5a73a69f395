"""Pictures of samples and numbers, as arrays or PNG bytes; matplotlib's objects only, so no state outlives a call."""

import io

import numpy as np
from scipy import ndimage

_TEACHER, _STUDENT, _TEXT, _RULE = "#8a94a3", "#d9480f", "#1f2933", "#d5dae1"
_COLOURS = ("#1c6dd0", "#d9480f", "#2b8a3e", "#7048c6", "#b08900", "#0b8a8f")
_DPI = 100
_SEPARATOR = 255


def _pixels(images):
  """[n, H, W, C] in [-1, 1] to uint8 [n, H, W, 3]."""
  images = np.nan_to_num(np.asarray(images, np.float64), nan=0.0, posinf=1.0, neginf=-1.0)
  if images.shape[-1] == 1:
    images = np.repeat(images, 3, axis=-1)
  elif images.shape[-1] != 3:
    # Latents have no colours and no fixed range: each channel is spread over the whole batch's.
    images = images[..., :3]
    low, high = images.min((0, 1, 2)), images.max((0, 1, 2))
    images = 2 * (images - low) / np.where(high > low, high - low, 1) - 1
    images = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 3 - images.shape[-1])), constant_values=-1.0)
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(images, columns, *, cell=32):
  """Images side by side, row by row, with white lines of one pixel between them.

  Args:
    images: [n, H, W, C] in [-1, 1]; grey, RGB, or the first three of other channels, normalised.
    columns: images a row; cells left over in the last row are white.
    cell: least height and width of a cell in pixels, reached by repeating pixels.
  Returns:
    uint8 [H', W', 3].
  Raises:
    ValueError: not [n, H, W, C] with n > 0, or columns < 1.
  """
  if np.ndim(images) != 4 or not np.size(images) or columns < 1:
    raise ValueError(f"a grid needs images [n, H, W, C], n > 0, and columns > 0; got {np.shape(images)} and {columns}")
  pixels = _pixels(images)
  scale = -(-cell // min(pixels.shape[1:3]))
  pixels = pixels.repeat(max(scale, 1), axis=1).repeat(max(scale, 1), axis=2)
  n, height, width, _ = pixels.shape
  rows = -(-n // columns)
  cells = np.full((rows * columns, height + 1, width + 1, 3), _SEPARATOR, np.uint8)
  cells[:n, :height, :width] = pixels
  grid = cells.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
  return grid.reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


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


def comparison(rows, *, cell=48):
  """One row a model, one column a noise, pixels kept crisp.

  Args:
    rows: list of (label, images [n, H, W, C] in [-1, 1]), all of one shape.
    cell: of `image_grid`.
  Returns:
    PNG bytes.
  Raises:
    ValueError: no rows, or rows of different shapes.
  """
  if not rows or len({np.shape(images) for _, images in rows}) > 1:
    raise ValueError(f"rows must hold images of one shape, got {[np.shape(images) for _, images in rows]}")
  columns, gap = len(rows[0][1]), 6
  # One grid of all rows, so that channels without a fixed range are normalised alike in each.
  grid = image_grid(np.concatenate([images for _, images in rows]), columns, cell=cell)
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
    log: logarithmic values.
  Returns:
    PNG bytes.
  """
  figure = _figure(860, 400)
  axes = figure.add_subplot()
  if log:
    axes.set_yscale("log", nonpositive="mask")
  for i, (name, (steps, values)) in enumerate(series.items()):
    steps, values = np.asarray(steps), np.asarray(values, np.float64)
    kept = np.isfinite(values)
    steps, values, colour = steps[kept], values[kept], _COLOURS[i % len(_COLOURS)]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    smooth = ndimage.uniform_filter1d(values, max(len(values) // 50, 1), mode="nearest")
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
  axes.set_title(title, loc="left", fontsize=12, color=_TEXT, parse_math=False)
  axes.set_xlabel("step", color=_TEXT)
  axes.set_ylabel(ylabel, color=_TEXT, parse_math=False)
  axes.grid(axis="y", color=_RULE, linewidth=0.6, alpha=0.6)
  _bare(axes)
  if series:
    axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
  figure.set_layout_engine("tight")
  return _png(figure)


def quality(rows):
  """Bars of `frechet` and `endpoint_error` for rows of `report.write_report`, a dash where there is none; PNG bytes."""
  figure = _figure(860, 90 + 34 * len(rows))
  names = [f"{r['model']}, {r['calls']} call{'s' if r['calls'] != 1 else ''}" for r in rows]
  colours = [_STUDENT if r["model"] == "student" else _TEACHER for r in rows]
  panels = figure.subplots(1, 2, sharey=True)
  for axes, key, title in zip(panels, ("frechet", "endpoint_error"), ("Fréchet distance to real", "Endpoint error")):
    values = [float("nan") if r.get(key) is None else float(r[key]) for r in rows]
    shown = np.isfinite(values)
    bars = axes.barh(range(len(rows)), np.where(shown, values, 0), color=colours, height=0.66)
    axes.bar_label(bars, [f"{v:.3g}" if s else "–" for v, s in zip(values, shown)], padding=4, fontsize=9, color=_TEXT)
    axes.set_title(f"{title} (lower is better)", loc="left", fontsize=10.5, color=_TEXT)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlim(0, 1.18 * max([v for v, s in zip(values, shown) if s], default=1) or 1)
    axes.set_xticks([])
    _bare(axes)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
  panels[0].invert_yaxis()
  figure.set_layout_engine("tight")
  return _png(figure)
