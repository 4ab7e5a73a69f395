"""Pixels end where they belong, and what is no picture is refused."""

import io

import numpy as np
from PIL import Image
import pytest

from piflow_jax import images


def test_image_grid_places_pixels():
  x_0 = np.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8, 1)
  grid = images.image_grid(x_0, 2)
  assert grid.shape == (65, 65, 3) and grid.dtype == np.uint8
  for i, (top, left) in enumerate([(0, 0), (0, 33), (33, 0)]):
    expected = np.kron(np.round((x_0[i, ..., 0] + 1) * 127.5), np.ones((4, 4)))
    for channel in range(3):
      np.testing.assert_array_equal(grid[top:top + 32, left:left + 32, channel], expected)
  assert (grid[32] == 255).all() and (grid[:, 32] == 255).all() and (grid[33:, 33:] == 255).all()


def test_image_grid_keeps_colours_and_clips():
  colours = np.array([-1.0, 0.2, 1.0]) * np.ones((1, 20, 40, 3))
  grid = images.image_grid(colours, 1)
  assert grid.shape == (40, 80, 3)  # 20 high: twice is the least factor that gives 32
  assert (grid == [0, 153, 255]).all()
  assert images.image_grid(np.tile(colours, (1, 2, 2, 1)), 1).shape == (40, 80, 3)
  clipped = images.image_grid(np.array([np.nan, 7, -7, -np.inf]).reshape(4, 1, 1, 1), 1)
  assert clipped[[0, 33, 66, 99], 0, 0].tolist() == [128, 255, 0, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_of_a_video_lie_side_by_side(channels):
  videos = np.random.default_rng(0).uniform(-1, 1, (4, 5, 32, 40, channels))
  grid = images.image_grid(videos, 2)
  assert grid.shape == (65, 2 * 200 + 1, 3)
  for i, (top, left) in enumerate([(0, 0), (0, 201), (33, 0), (33, 201)]):
    for frame in range(5):
      found = grid[top:top + 32, left + 40 * frame:left + 40 * (frame + 1)]
      np.testing.assert_array_equal(found, images.image_grid(videos[i, frame][None], 1))


@pytest.mark.parametrize("shape, shown", [
    ((8, 8, 1), True), ((8, 6, 3), True), ((5, 8, 8, 3), True), ((32, 32, 4), False), ((1, 1, 2), False), ((2,), False),
    ((3,), False), ((16, 3), False), ((5, 32, 32, 16), False), ((2, 5, 8, 8, 3), False)])
def test_what_is_shown(shape, shown):
  assert images.shows(shape) == shown
  if shown:
    assert images.image_grid(np.zeros((2, *shape)), 2).dtype == np.uint8
  else:
    with pytest.raises(ValueError, match="is not .n, H, W, C. or .n, T, H, W, C. with 1 or 3 channels"):
      images.image_grid(np.zeros((2, *shape)), 2)


@pytest.mark.parametrize("shape, columns", [((8, 8, 1), 2), ((0, 8, 8, 1), 2), ((1, 8, 8, 1), 0)])
def test_grids_of_nothing_are_refused(shape, columns):
  with pytest.raises(ValueError):
    images.image_grid(np.zeros(shape), columns)


def test_png_is_lossless():
  pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images.png(pixels)))), pixels)
