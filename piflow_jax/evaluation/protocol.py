"""How a FID is measured: what differs between published figures, by name, and said in each report."""

from typing import NamedTuple

IMAGENET = 1_281_167  # training images, of which the known references are made
ADM_ROWS = 10_000  # single pictures that ADM's reference holds


class Protocol(NamedTuple):
  """One way to measure."""

  name: str
  labels: str  # of samples: see `draws.labels`
  reference: str  # in words
  block: int | None  # of the Inception score: see `inception_score.inception_score`
  splits: int
  permuted: bool
  neighbours: int  # reference rows for precision and recall; 0: not measured
  half: bool  # distances of precision and recall in float16

  def says(self):
    """{what: how} for a report."""
    parts = f"parts of {self.block} in order" if self.block else f"{self.splits} parts" + (
        ", shuffled by RandomState(2020)" if self.permuted else "")
    kind = "float16 where finite" if self.half else "float32"
    return {
        "protocol": self.name, "labels": self.labels, "bytes": "to nearest: floor(127.5 x + 128)",
        "reference of the protocol": self.reference, "inception score": f"{parts}; logits without bias",
        "precision and recall": f"k = 3, {self.neighbours} reference rows, {kind}" if self.neighbours else "not of it"}


PROTOCOLS = {
    # The paper's (pi-Flow), and DiT's, SiT's and REPA's tables: guided-diffusion's evaluator.
    "adm": Protocol(
        "adm", "random", "ADM's VIRTUAL_imagenet256_labeled.npz", block=5000, splits=10, permuted=False,
        neighbours=ADM_ROWS, half=True),
    # MeanFlow's and improved MeanFlow's JAX figures. Their labels are drawn by the device's batch (MeanFlow), or in
    # turn (improved MeanFlow); here in turn, which does not depend on devices.
    "meanflow": Protocol(
        "meanflow", "balanced", "MeanFlow's imagenet_256_fid_stats.npz", block=None, splits=10, permuted=True,
        neighbours=0, half=False),
}
