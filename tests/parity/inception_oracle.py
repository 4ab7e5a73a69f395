"""torch-fidelity's Inception, whose import of torchvision wants operators that PyTorch's CPU build lacks."""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")  # it is defined as long as this lives
for _name in ("nms", "qnms"):
  _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def extractor(path, taps):
  """torch-fidelity's extractor of a .pth file; (images uint8 [n, H, W, 3]) -> {tap: array}."""
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  network = FeatureExtractorInceptionV3("inception", list(taps), feature_extractor_weights_path=str(path)).eval()
  spatial = []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: spatial.append(out))

  def extract(images):
    spatial.clear()
    with torch.no_grad():
      found = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return dict(zip(taps, (x.numpy() for x in found))) | {
        "spatial": spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()}

  return extract
