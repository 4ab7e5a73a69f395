"""Pictures as arrays, by NumPy alone: which x_0 can be shown, grids of them, PNG files."""

import io

import numpy as np

_SEPARATOR = 255  # white


def shows(shape):
  """Whether x_0 of this shape, without the batch, is a picture: [H, W, C] or a video [T, H, W, C], grey or RGB."""
  return len(shape) in (3, 4) and shape[-1] in (1, 3)


def to_pixels(x_0):
  """x_0 [n, H, W, C] or [n, T, H, W, C] in [-1, 1] as uint8 [n, H, W, 3], a video's frames side by side.

  Values beyond [-1, 1] are clipped; NaN is grey.

  Raises:
    ValueError: x_0 is no batch of pictures; see `shows`.
  """
  if not shows(np.shape(x_0)[1:]):
    raise ValueError(f"x_0: shape {np.shape(x_0)} is not [n, H, W, C] or [n, T, H, W, C] with 1 or 3 channels")
  x = np.nan_to_num(np.asarray(x_0, np.float64), nan=0.0, posinf=1.0, neginf=-1.0)
  if x.ndim == 5:
    n, frames, height, width, channels = x.shape
    x = np.moveaxis(x, 1, 2).reshape(n, height, frames * width, channels)
  x = np.broadcast_to(x, (*x.shape[:3], 3))
  return np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(x_0, columns, *, cell=32):
  """Pictures side by side, row by row, with white lines of one pixel between them.

  Args:
    x_0: as in `to_pixels`.
    columns: pictures a row; cells left over in the last row are white.
    cell: least height and width of a cell in pixels, reached by repeating pixels.
  Returns:
    uint8 [H', W', 3].
  Raises:
    ValueError: x_0 is no batch of pictures or is empty, or columns < 1.
  """
  if not np.size(x_0) or columns < 1:
    raise ValueError(f"columns: a grid needs pictures and columns > 0, got x_0 {np.shape(x_0)} and {columns}")
  pixels = to_pixels(x_0)
  scale = -(-cell // min(pixels.shape[1:3]))
  pixels = pixels.repeat(max(scale, 1), axis=1).repeat(max(scale, 1), axis=2)
  n, height, width, _ = pixels.shape
  rows = -(-n // columns)
  cells = np.full((rows * columns, height + 1, width + 1, 3), _SEPARATOR, np.uint8)
  cells[:n, :height, :width] = pixels
  grid = cells.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
  return grid.reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


def png(pixels, texts=()):
  """PNG bytes of uint8 [H, W, 3], with {keyword: text} beside the picture."""
  from PIL import Image  # only those who write pictures need Pillow
  from PIL import PngImagePlugin

  beside, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
  for keyword, text in dict(texts).items():
    beside.add_itxt(keyword, text)
  Image.fromarray(pixels).save(buffer, "PNG", pnginfo=beside)
  return buffer.getvalue()
