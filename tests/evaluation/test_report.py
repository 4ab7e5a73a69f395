"""Pictures put pixels where they belong; a report holds everything it was given."""

import base64
import html.parser
import io
import json

import numpy as np
from PIL import Image
import pytest

from piflow_jax.evaluation import figures
from piflow_jax.evaluation import report


def _decoded(png):
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _row(model, calls, **values):
  return dict(model=model, calls=calls, frechet=1.5, frechet_to_teacher=0.25, precision=0.875, recall=0.75,
              accuracy=0.9375, diversity=0.625, endpoint_error=0.125, seconds_per_1000=2.5) | values


ROWS = [_row("teacher", 128, frechet_to_teacher=None, endpoint_error=None), _row("teacher", 1, frechet=float("nan")),
        _row("student", np.int64(1), frechet=np.float32(2.25))]


def test_image_grid_places_pixels():
  images = np.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8, 1)
  grid = figures.image_grid(images, 2)
  assert grid.shape == (65, 65, 3) and grid.dtype == np.uint8
  for i, (top, left) in enumerate([(0, 0), (0, 33), (33, 0)]):
    expected = np.kron(np.round((images[i, ..., 0] + 1) * 127.5), np.ones((4, 4)))
    for channel in range(3):
      np.testing.assert_array_equal(grid[top:top + 32, left:left + 32, channel], expected)
  assert (grid[32] == 255).all() and (grid[:, 32] == 255).all() and (grid[33:, 33:] == 255).all()


def test_image_grid_takes_any_channels():
  colours = np.array([-1.0, 0.2, 1.0]) * np.ones((1, 20, 40, 3))
  grid = figures.image_grid(colours, 1)
  assert grid.shape == (40, 80, 3)  # 20 high: twice is the least factor that gives 32
  assert (grid == [0, 153, 255]).all()
  assert figures.image_grid(np.tile(colours, (1, 2, 2, 1)), 1).shape == (40, 80, 3)
  latents = np.random.default_rng(0).normal(3, 10, (4, 32, 32, 4))
  grid = figures.image_grid(latents, 4)
  cells = np.stack(np.split(np.delete(grid, [32, 65, 98], axis=1), 4, axis=1))
  expected = (latents - latents.min((0, 1, 2))) / np.ptp(latents, (0, 1, 2)) * 255
  np.testing.assert_allclose(cells, expected[..., :3], atol=0.51)
  assert figures.image_grid(latents[..., :2], 4).shape == grid.shape
  clipped = figures.image_grid(np.array([np.nan, 7, -7, -np.inf]).reshape(4, 1, 1, 1), 1)
  assert clipped[[0, 33, 66, 99], 0, 0].tolist() == [128, 255, 0, 0]


def test_comparison_copies_pixels():
  rng = np.random.default_rng(0)
  rows = [(label, rng.uniform(-1, 1, (5, 8, 8, 1))) for label in ("teacher, 128 calls", "student & $x$")]
  picture = _decoded(figures.comparison(rows))
  grids = [figures.image_grid(images, 5, cell=48) for _, images in rows]
  height, width = grids[0].shape[:2]
  assert picture.shape[0] == 2 * height + 6 and picture.shape[1] > width + 80
  np.testing.assert_array_equal(picture[:height, -width:], grids[0])
  np.testing.assert_array_equal(picture[-height:, -width:], grids[1])
  labels = picture[:, :-width]
  assert (labels[:height] < 128).any() and (labels[-height:] < 128).any()


def test_charts_decode():
  steps = np.arange(100)
  with_gap = np.where(steps == 5, np.nan, np.exp(-steps / 30))
  series = {"teacher": (steps, with_gap), "student": (steps, 0 * with_gap), "none yet": ([], [])}
  for png in (figures.curves(series, "Loss", "loss"), figures.curves(series, "Loss $", "loss", log=False)):
    assert _decoded(png).shape == (400, 860, 3) and len(np.unique(_decoded(png).reshape(-1, 3), axis=0)) > 20
  # The orange of the student's bar is in both panels; a row without a value has none.
  picture = _decoded(figures.quality(ROWS))
  assert picture.shape == (192, 860, 3)
  bars = (picture == [0xd9, 0x48, 0x0f]).all(-1)
  assert bars[:, :430].any() and bars[:, 430:].any()
  no_student = _decoded(figures.quality([_row("student", 1, frechet=None, endpoint_error=float("nan"))]))
  assert not (no_student == [0xd9, 0x48, 0x0f]).all(-1).any()


@pytest.mark.parametrize("call", [
    lambda: figures.image_grid(np.zeros((8, 8, 1)), 2),
    lambda: figures.image_grid(np.zeros((0, 8, 8, 1)), 2),
    lambda: figures.image_grid(np.zeros((1, 8, 8, 1)), 0),
    lambda: figures.comparison([]),
    lambda: figures.comparison([("a", np.zeros((1, 8, 8, 1))), ("b", np.zeros((2, 8, 8, 1)))]),
])
def test_pictures_of_nothing_are_refused(call):
  with pytest.raises(ValueError):
    call()


class _Page(html.parser.HTMLParser):
  """Table cells, images, addresses and text of a page; fails on tags that do not close."""

  def __init__(self, text):
    super().__init__()
    self.open, self.cells, self.images, self.addresses, self.text = [], [], {}, [], ""
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.addresses += [attrs[k] for k in ("src", "href") if k in attrs]
    if tag == "img":
      self.images[attrs["alt"]] = attrs["src"]
    if tag == "td":
      self.cells.append("")
    if tag not in ("img", "meta"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if "td" in self.open:
      self.cells[-1] += data


def _write(folder, **changes):
  given = dict(
      title="Digits <b>&", rows=ROWS, minutes={"teacher": 1.25},
      reference={"real <vs> held-out": 0.5, "none": float("inf")},
      pictures={'Samples <i>&"': figures.comparison([("a", np.zeros((2, 8, 8, 1)))]), "Second": b"not looked into"},
      checks=[("near <the> teacher", np.float64(1.5), "<= 2", np.bool_(True)), ("no figure", float("nan"), 3, False)])
  given |= changes
  return given, report.write_report(folder, **given)


def test_report_json_round_trips(tmp_path):
  _write(tmp_path / "new" / "folder")
  constants = []
  data = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(), parse_constant=constants.append)
  assert not constants  # NaN and Infinity are no JSON
  assert data == {
      "rows": [ROWS[0], ROWS[1] | {"frechet": None}, ROWS[2] | {"frechet": 2.25, "calls": 1}],
      "minutes": {"teacher": 1.25},
      "reference": {"real <vs> held-out": 0.5, "none": None},
      "checks": [{"text": "near <the> teacher", "value": 1.5, "bound": "<= 2", "passed": True},
                 {"text": "no figure", "value": None, "bound": 3, "passed": False}],
  }


def test_report_html_holds_everything(tmp_path):
  given, path = _write(str(tmp_path))
  assert path.name == "report.html"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
  page = _Page(path.read_text())
  assert page.images.keys() == given["pictures"].keys()
  for caption, png in given["pictures"].items():
    assert base64.b64decode(page.images[caption].removeprefix("data:image/png;base64,")) == png
  assert all(a.startswith("data:") for a in page.addresses)  # self-contained
  assert page.cells[:30] == [
      "teacher", "128", "1.500", "–", "0.875", "0.750", "0.938", "0.625", "–", "2.5",
      "teacher", "1", "–", "0.250", "0.875", "0.750", "0.938", "0.625", "0.125", "2.5",
      "student", "1", "2.250", "0.250", "0.875", "0.750", "0.938", "0.625", "0.125", "2.5"]
  assert page.cells[30:] == ["real <vs> held-out", "0.5", "none", "–", "teacher", "1.2"]
  for text in (given["title"], "near <the> teacher",
               "measured 1.5, bound <= 2", "measured –, bound 3", "1 of 2 failed"):
    assert text in page.text
  assert page.text.count("✓") == page.text.count("✗") == 1


def test_a_write_that_fails_leaves_the_last_report(tmp_path):
  _, path = _write(tmp_path)
  before = path.read_text(), (tmp_path / "report.json").read_text()
  with pytest.raises(TypeError):
    _write(tmp_path, title="new", rows=[_row("teacher", 1, more=object())])
  assert (path.read_text(), (tmp_path / "report.json").read_text()) == before
  _write(tmp_path, title="new", checks=[], pictures={}, minutes={}, reference={})
  assert _Page(path.read_text()).text.startswith("new")
