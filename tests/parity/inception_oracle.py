"""torch-fidelity's Inception, without the torchvision that it imports and does not use.

PyPI's torchvision does not load beside PyTorch's CPU build, and transformers would try it wherever it is installed.
"""

import sys
import types

import torch

for _name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
  _module = types.ModuleType(_name)
  for _word in ("CIFAR10", "CIFAR100", "STL10"):
    setattr(_module, _word, None)
  _parent, _, _last = _name.rpartition(".")
  if _parent:
    setattr(sys.modules[_parent], _last, _module)
  sys.modules.setdefault(_name, _module)


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
