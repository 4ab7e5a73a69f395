"""Pictures put pixels where they belong; a report holds everything it was given."""

import base64
import html.parser
import io
import json

import numpy as np
from PIL import Image
import pytest

from piflow_jax import images as images_lib
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import report


def _decoded(png):
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _row(model, calls, **values):
  return dict(model=model, calls=calls, frechet=1.5, frechet_to_teacher=0.25, precision=0.875, recall=0.75,
              accuracy=0.9375, diversity=0.625, endpoint_error=0.125, seconds_per_1000=2.5) | values


ROWS = [_row("teacher", 128, frechet_to_teacher=None, endpoint_error=None), _row("teacher", 1, frechet=float("nan")),
        _row("student", np.int64(1), frechet=np.float32(2.25))]


def test_comparison_copies_pixels():
  rng = np.random.default_rng(0)
  rows = [(label, rng.uniform(-1, 1, (5, 8, 8, 1))) for label in ("teacher, 128 calls", "student & $x$")]
  picture = _decoded(figures.comparison(rows))
  grids = [images_lib.image_grid(images, 5, cell=48) for _, images in rows]
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
  # No title runs into the next panel's: left of its axis nothing is written above the bars.
  second = np.flatnonzero(_where(figures.quality(ROWS), RULE).sum(0) > 60)[-1]
  assert second > 300 and (picture[:40, second - 8:second - 1] > 200).all() and (picture[:40, second:] < 128).any()
  # What no row has gets no panel.
  alone = (_decoded(figures.quality([_row("student", 1, frechet=None)])) == [0xd9, 0x48, 0x0f]).all(-1)
  assert alone[:, :430].any() and alone[:, 430:].sum() > bars[:, 430:].sum()
  no_student = _decoded(figures.quality([_row("student", 1, frechet=None, endpoint_error=float("nan"))]))
  assert not (no_student == [0xd9, 0x48, 0x0f]).all(-1).any()


def _method(method, calls, *, passes=5, steps=100, **values):
  return dict(method=method, calls=calls, seeds=list(range(max(map(len, values.values()), default=3))), passes=passes,
              steps=steps, values=values)


BLUE, ORANGE, GREY, RULE = [0x1c, 0x6d, 0xd0], [0xd9, 0x48, 0x0f], [0x8a, 0x94, 0xa3], [0xd5, 0xda, 0xe1]


def _where(png, colour, tolerance=0):
  return (np.abs(_decoded(png).astype(int) - colour) <= tolerance).all(-1)


def test_methods_puts_each_metric_in_a_panel():
  draw = lambda rows, metrics="ab": figures.methods(rows, list(metrics), [f"Metric ${m}" for m in metrics])
  rows = [_method("teacher", 1, a=[9.0, 9.1], b=[2.0, 2.0]), _method("teacher", 128, a=[1.0, 1.0], b=[None, 0.0]),
          _method("gm", 1, a=[2.0, 2.5], b=[None, float("nan")]), _method("gm", 4, a=[2.0, 2.0], b=[None, None]),
          _method("$dx", 1, a=[3.0, 3.5], b=[1.0, 1.0]), _method("$dx", 4, a=[2.0, None], b=[1.0, 1.5])]
  picture = draw(rows)
  # Four names of 60 + 7 * 18 pixels each fit one row of the legend.
  assert _decoded(picture).shape == (260, 860, 3) and _decoded(draw(rows, "aba")).shape == (500, 860, 3)
  below = slice(60, None)
  gm, dx = _where(picture, BLUE)[below], _where(picture, ORANGE)[below]
  assert gm[:, :430].any() and not gm[:, 430:].any()  # without values, no line
  assert dx[:, :430].any() and dx[:, 430:].any()
  # The most calls of the teacher are one line from side to side, where there is a value to show.
  lines = _where(picture, GREY)[below].sum(1), _where(picture, GREY)[below, 430:].sum(1)
  assert lines[0].max() > 300 and lines[1].max() < 200
  assert _decoded(draw(rows[2:])).shape == (260, 860, 3) and not _where(draw(rows[2:]), GREY).any()
  many = [_method(f"a method of a long name {i}", 1, a=[1.0]) for i in range(10)]
  assert _decoded(draw(many, "a")).shape == (240 + 4 * 20, 860, 3)


def test_methods_shows_means_and_deviations():
  def draw(values):
    rows = [_method("gm", 1, a=values), _method("gm", 2, a=[1.0, 1.0]), _method("dx", 1, a=[5.0, 5.0])]
    return figures.methods(rows, ["a"], ["A"])

  narrow = draw([2.0, 2.2])
  assert draw([2.2, 2.0]) == narrow  # seeds have no order
  assert len({narrow, *map(draw, ([2.0, 2.3], [1.9, 2.3], [2.1, None], [None, None]))}) == 5
  # Bars grow with the deviation; one that reaches below zero goes down to the axis.
  bars = [np.flatnonzero(_where(draw(v), BLUE, 80)[60:, :140].any(1)) for v in ([2.0, 2.2], [1.6, 2.6], [0.1, 6.1])]
  assert np.ptp(bars[1]) > 1.5 * np.ptp(bars[0])
  axis = np.flatnonzero(_where(draw([0.1, 6.1]), RULE)[60:].sum(1) > 200).max()
  assert axis - bars[1].max() > 10 and abs(axis - bars[2].max()) < 3
  # Nor does it stretch the axis without end: the mean stays in the middle.
  alone = _where(figures.methods([_method("gm", 1, a=[0.1, 6.1])], ["a"], ["A"]), BLUE, 80)[60:]
  marker, top = alone.sum(1).argmax(), np.flatnonzero(alone.any(1)).min()
  assert 0.3 < (axis - marker) / (axis - top) < 0.7


def test_methods_stand_side_by_side():
  rows = [_method(name, calls, a=[1.0, 1.5]) for name in ("gm", "dx") for calls in (1, 2)]
  picture = figures.methods(rows, ["a"], ["A"])
  gm, dx = (np.flatnonzero(_where(picture, colour, 80)[60:].sum(0) > 40) for colour in (BLUE, ORANGE))  # the bars
  assert 2 <= len(gm) <= 12 and 2 <= len(dx) <= 12 and min(abs(i - j) for i in gm for j in dx) > 10


def test_methods_keep_half_of_their_panel():
  rows = [_method("gm", n, a=[float(n)]) for n in (1, 2)]
  far = [_method("teacher", n, a=[v]) for n, v in ((1, 1e4), (2, 1e3), (128, 1.0))]
  heights = [np.ptp(np.flatnonzero(_where(figures.methods(r, ["a"], ["A"]), BLUE, 80)[60:].any(1)))
             for r in (rows, rows + far)]
  assert heights[1] > 0.4 * heights[0]


def test_lines_side_by_side():
  x, y = np.array([1, 10, 100]), np.array([1.0, 0.1, 0.01])
  def draw(log, y=y):
    one = ("One $", "points $K", "error", {"gm": (x, y)}, log)
    return figures.lines([one, ("Two", "N", "error $", {"dx": (x, y)}, log)], "Both $")

  pictures = {log: draw(log) for log in ("", "x", "y", "xy")}
  assert len(set(pictures.values())) == 4
  for picture in pictures.values():
    assert _decoded(picture).shape == (400, 860, 3)
    gm, dx = _where(picture, BLUE)[:360], _where(picture, ORANGE)[:360]
    assert gm[:, :430].any() and not gm[:, 430:].any() and dx[:, 430:].any() and not dx[:, :430].any()
  # A power law is straight on two logarithmic axes: its middle lies half-way between its ends.
  points = np.argwhere(_where(pictures["xy"], BLUE)[60:340, :430])
  middle = points[np.abs(points[:, 1] - (points[:, 1].min() + points[:, 1].max()) / 2) < 2, 0].mean()
  assert abs(middle - (points[:, 0].min() + points[:, 0].max()) / 2) < 3
  assert draw("xy", 2 * y) != pictures["xy"]
  assert draw("xy", [1.0, None, 0.01]) == draw("xy", [1.0, -3.0, 0.01]) == draw("xy", [1.0, float("nan"), 0.01])
  assert draw("x", [1.0, -3.0, 0.01]) != draw("x", [1.0, None, 0.01])
  same = figures.lines([("One", "x", "y", {"gm": (x, y)}, ""), ("Two", "x", "y", {"dx": (x, y), "gm": (x, y)}, "")], "")
  assert _where(same, BLUE)[:360, 430:].any()  # a name keeps its colour from panel to panel
  assert _decoded(figures.lines([("a", "x", "y", {"none": ([], [])}, "xy")] * 4, "wide")).shape == (400, 1360, 3)


@pytest.mark.parametrize("call", [
    lambda: figures.comparison([]),
    lambda: figures.comparison([("a", np.zeros((1, 8, 8, 1))), ("b", np.zeros((2, 8, 8, 1)))]),
    lambda: figures.lines([], "nothing"),
    lambda: figures.lines([("a", "x", "y", {}, "log")], "no such axis"),
    lambda: figures.methods([], ["frechet"], ["Frechet"]),
    lambda: figures.methods([_method("teacher", 1, frechet=[1.0])], ["frechet"], ["Frechet"]),
    lambda: figures.methods([_method("a", 1, frechet=[1.0])], [], []),
    lambda: figures.methods([_method("a", 1, frechet=[1.0])], ["frechet"], []),
])
def test_pictures_of_nothing_are_refused(call):
  with pytest.raises(ValueError):
    call()


class _Page(html.parser.HTMLParser):
  """Table headings, cells, bold ones, images, addresses and text of a page; fails on tags that do not close."""

  def __init__(self, text):
    super().__init__()
    self.open, self.cells, self.bold, self.images, self.addresses, self.text = [], [], [], {}, [], ""
    self.headings = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.addresses += [attrs[k] for k in ("src", "href") if k in attrs]
    if tag == "img":
      self.images[attrs["alt"]] = attrs["src"]
    if tag == "td":
      self.cells.append("")
    if tag == "th":
      self.headings.append("")
    if tag not in ("img", "meta"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if "th" in self.open:
      self.headings[-1] += data
    if "td" in self.open:
      self.cells[-1] += data
      if "b" in self.open:
        self.bold.append(len(self.cells) - 1)


def _write(folder, **changes):
  given = dict(
      title="Digits <b>&", rows=ROWS, settings={"h": 0.5, "net <&": {"seed": np.int64(3)}}, notes=["few <samples>"],
      minutes={"teacher": 1.25},
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
      "settings": {"h": 0.5, "net <&": {"seed": 3}},
      "notes": ["few <samples>"],
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
      "teacher", "128", "1.50", "–", "0.875", "0.750", "0.938", "0.625", "–", "2.50",
      "teacher", "1", "–", "0.250", "0.875", "0.750", "0.938", "0.625", "0.125", "2.50",
      "student", "1", "2.25", "0.250", "0.875", "0.750", "0.938", "0.625", "0.125", "2.50"]
  assert page.cells[30:] == ["real <vs> held-out", "0.5", "none", "–", "h", "0.5", "net <&.seed", "3", "teacher", "1.2"]
  assert [heading for heading in page.headings if heading] == [
      "model", "calls", "Fréchet ↓", "Fréchet to teacher ↓", "precision ↑", "recall ↑", "accuracy ↑", "diversity",
      "endpoint error ↓", "s / 1000"]
  for text in (given["title"], "near <the> teacher", "few <samples>",
               "measured 1.5, bound <= 2", "measured –, bound 3", "1 of 2 failed"):
    assert text in page.text
  assert page.text.count("✓") == page.text.count("✗") == 1


def test_a_metric_that_no_row_has_gets_no_column(tmp_path):
  rows = [_row(model, 1, frechet=None, frechet_to_teacher=None) for model in ("student", "model")]
  page = _Page(_write(tmp_path, rows=rows)[1].read_text())
  assert page.headings == [
      "model", "calls", "precision ↑", "recall ↑", "accuracy ↑", "diversity", "endpoint error ↓", "s / 1000"]
  assert page.cells[:8] == ["student", "1", "0.875", "0.750", "0.938", "0.625", "0.125", "2.50"]
  # Small figures get more decimals, all of a column alike.
  small = [_row("model", n, endpoint_error=value) for n, value in ((1, 0.002), (2, 0.5))]
  cells = np.reshape(_Page(_write(tmp_path, rows=small)[1].read_text()).cells[:20], (2, 10))
  assert cells[:, 8].tolist() == ["0.0020", "0.5000"]


def test_a_write_that_fails_leaves_the_last_report(tmp_path):
  _, path = _write(tmp_path)
  before = path.read_text(), (tmp_path / "report.json").read_text()
  with pytest.raises(TypeError):
    _write(tmp_path, title="new", rows=[_row("teacher", 1, more=object())])
  assert (path.read_text(), (tmp_path / "report.json").read_text()) == before
  _write(tmp_path, title="new", checks=[], pictures={}, minutes={}, reference={})
  assert _Page(path.read_text()).text.startswith("new")


COMPARED = [
    _method("gm <i>&", 2, frechet=[2.0, 2.5, 1.5], accuracy=[0.5, 0.5, 0.5], diversity=[0.75, 0.75, 0.75],
            seconds_per_step=[1.001, 1.001, 1.001], seconds_per_1000=[1.0, 2.0, 3.0]),
    _method("dx", 2, frechet=[2.0, 3.0, 4.0], accuracy=[0.5, 0.75, 1.0], diversity=[0.25, 0.25, 0.25],
            seconds_per_step=[1.0, 1.0, 1.0], seconds_per_1000=[3.0, 2.0, 4.0]),
    _method("lost", 2, passes=None, steps=None, frechet=[1.0, None, float("nan")], accuracy=[None] * 3,
            diversity=[0.4, 0.4, 0.4], seconds_per_step=[2.0, 2.0, 2.0], seconds_per_1000=[9.0, 9.0, 9.0]),
    _method("dx", 1, passes=4.5, frechet=[9.0], endpoint_error=[np.float32(0.25)]),
    _method("teacher", 128, passes=None, steps=None, frechet=[1.0], accuracy=[1.0], diversity=[0.375],
            endpoint_error=[0.0], seconds_per_1000=[40]),
    _method("teacher", 1, passes=None, steps=None, frechet=[40.0], diversity=[0.75]),
]


def _write_comparison(folder, **changes):
  given = dict(
      title="Methods <b>&", rows=COMPARED, settings={"samples": np.int64(20), "net <&": {"width": 64, "sizes": (1, 2)}},
      notes=["Same <i>network</i> & data"], pictures={'Calls <i>&"': b"not looked into"})
  given |= changes
  return given, report.write_comparison(folder, **given)


def test_comparison_json_adds_means(tmp_path):
  _, path = _write_comparison(tmp_path / "new" / "folder")
  assert path.name == "compare.html"
  assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["compare.html", "compare.json"]
  constants = []
  data = json.loads((path.parent / "compare.json").read_text(), parse_constant=constants.append)
  assert not constants and data.keys() == {"rows", "settings", "notes"}
  assert data["settings"] == {"samples": 20, "net <&": {"width": 64, "sizes": [1, 2]}}
  assert data["notes"] == ["Same <i>network</i> & data"]
  gm, dx, lost, single = data["rows"][:4]
  assert gm == COMPARED[0] | {
      "mean": {"frechet": 2.0, "accuracy": 0.5, "diversity": 0.75, "seconds_per_step": pytest.approx(1.001),
               "seconds_per_1000": 2.0},
      "std": {"frechet": 0.5, "accuracy": 0, "diversity": 0, "seconds_per_step": pytest.approx(0),
              "seconds_per_1000": 1.0}}
  assert (dx["mean"]["frechet"], dx["std"]["frechet"], dx["std"]["accuracy"]) == (3.0, 1.0, 0.25)
  assert lost["values"]["frechet"] == [1.0, None, None] and (lost["passes"], lost["steps"]) == (None, None)
  assert (lost["mean"]["frechet"], lost["std"]["frechet"]) == (1.0, None)
  assert (lost["mean"]["accuracy"], lost["std"]["accuracy"]) == (None, None)
  assert (single["mean"], single["std"]) == ({"frechet": 9.0, "endpoint_error": 0.25},
                                             {"frechet": None, "endpoint_error": None})
  assert [row["method"] for row in data["rows"]] == [row["method"] for row in COMPARED]


def test_comparison_table_groups_rows_and_marks_the_best(tmp_path):
  _, path = _write_comparison(tmp_path)
  page = _Page(path.read_text())
  # A metric that no row has gets no column.
  assert [heading for heading in page.headings if "call" not in heading or heading == "calls"] == [
      "method", "calls", "seeds", "passes", "steps", "Fréchet ↓", "accuracy ↑", "diversity", "endpoint error ↓",
      "s / step", "s / 1000", "teacher"]
  assert np.reshape(page.cells[:6 * 11], (6, 11)).tolist() == [
      ["teacher", "1", "1", "–", "–", "40.00", "–", "0.750", "–", "–", "–"],
      ["teacher", "128", "1", "–", "–", "1.00", "1.000", "0.375", "0.000", "–", "40.00"],
      ["dx", "1", "1", "4.5", "100", "9.00", "–", "–", "0.250", "–", "–"],
      ["gm <i>&", "2", "3", "5", "100", "2.00 ± 0.50", "0.500 ± 0.000", "0.750 ± 0.000", "–", "1.00 ± 0.00",
       "2.00 ± 1.00"],
      ["dx", "2", "3", "5", "100", "3.00 ± 1.00", "0.750 ± 0.250", "0.250 ± 0.000", "–", "1.00 ± 0.00", "3.00 ± 1.00"],
      ["lost", "2", "3", "–", "–", "1.00 (1 of 3)", "–", "0.400 ± 0.000", "–", "2.00 ± 0.00", "9.00 ± 0.00"],
  ]
  # Not the teacher, not the mean of the seeds that were left, not the faster by a thousandth.
  assert [divmod(i, 11) for i in page.bold] == [(2, 5), (2, 8), (3, 5), (3, 10), (4, 6), (5, 7)]
  order = [page.text.index(heading) for heading in ("1 call", "2 calls")]
  assert order == sorted(order)
  assert path.read_text().count('<tr class="teacher">') == 2


def test_comparison_without_a_teacher_knows_no_best_diversity(tmp_path):
  _, path = _write_comparison(tmp_path, rows=COMPARED[:2], settings={}, notes=[], pictures={})
  page = _Page(path.read_text())
  assert [divmod(i, 10) for i in page.bold] == [(0, 5), (0, 9), (1, 6)]
  # Two that are alike are both best, but neither is fastest; small figures get more decimals.
  alike = [_method(name, 1, pixel_frechet=[0.004], seconds_per_1000=[0.25]) for name in ("a", "b")]
  page = _Page(_write_comparison(tmp_path, rows=alike)[1].read_text())
  assert [divmod(i, 7) for i in page.bold] == [(0, 5), (1, 5)]
  assert page.cells[5:7] == ["0.0040", "0.250"]


def test_comparison_html_escapes_and_needs_no_other_file(tmp_path):
  given, path = _write_comparison(str(tmp_path))
  page = _Page(path.read_text())
  assert base64.b64decode(page.images['Calls <i>&"'].removeprefix("data:image/png;base64,")) == b"not looked into"
  assert all(a.startswith("data:") for a in page.addresses)
  assert page.cells[6 * 11:] == ["samples", "20", "net <&.width", "64", "net <&.sizes", "1, 2"]
  for text in (given["title"], given["notes"][0], "gm <i>&", "What the columns say"):
    assert text in page.text
  assert "<i>" not in path.read_text() and "prefers-color-scheme:dark" in path.read_text()


def test_a_comparison_is_replaced_whole_or_not_at_all(tmp_path):
  _, path = _write_comparison(tmp_path)
  paths = [path, path.with_suffix(".json")]
  before = [p.read_text() for p in paths]
  for row, error in ((_method("a", 1, frechet=[1.0]) | {"more": object()}, TypeError),
                     (_method("a", 1, frechet=[1.0, 2.0], accuracy=[1.0]), ValueError)):
    with pytest.raises(error):
      _write_comparison(tmp_path, title="new", rows=[row])
    assert [p.read_text() for p in paths] == before
  with open(paths[0], encoding="utf-8") as page, open(paths[1], encoding="utf-8") as data:
    _write_comparison(tmp_path, title="new", notes=["new"])
    assert [page.read(), data.read()] == before  # who reads while it is written reads the last one to its end
  assert all("new" in p.read_text() for p in paths) and len(list(tmp_path.iterdir())) == 2
