"""torch-fidelity's Inception, without the torchvision that it imports and does not use.

PyPI's torchvision does not load beside PyTorch's CPU build, and transformers would try it wherever it is installed.
"""

import importlib
import importlib.machinery
import sys
import types

import torch

_NAMES = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def imported(name):
  """A module of torch-fidelity, imported with empty modules in torchvision's place, which are gone afterwards."""
  stand_ins = {}
  for place in _NAMES:
    module = stand_ins[place] = types.ModuleType(place)
    module.__spec__ = importlib.machinery.ModuleSpec(place, None)
    module.CIFAR10 = module.CIFAR100 = module.STL10 = object
    parent, _, last = place.rpartition(".")
    if parent:
      setattr(stand_ins[parent], last, module)
  missing = {place: module for place, module in stand_ins.items() if place not in sys.modules}
  sys.modules.update(missing)
  try:
    return importlib.import_module(name)
  finally:
    for place in missing:
      del sys.modules[place]


def extractor(path, taps):
  """torch-fidelity's extractor of a .pth file; (images uint8 [n, H, W, 3]) -> {tap: array}."""
  inception = imported("torch_fidelity.feature_extractor_inceptionv3")
  network = inception.FeatureExtractorInceptionV3(
      "inception", list(taps), feature_extractor_weights_path=str(path)).eval()
  spatial = []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: spatial.append(out))

  def extract(images):
    spatial.clear()
    with torch.no_grad():
      found = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return dict(zip(taps, (x.numpy() for x in found))) | {
        "spatial": spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()}

  return extract
