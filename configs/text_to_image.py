"""What the recipes of configs/flux.py and configs/qwen_image.py share: pi-Flow's text-to-image students.

Source: the authors' configs and section 4.2 of arXiv 2510.14974 (docs/text_to_image.md has the table).
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import lora
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import parallel_decoding
from piflow_jax.evaluation import torch_features
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel

RECIPES = {
    "gm-4nfe": "GM policy, K = 8, for 4 calls and more; on pictures' latents",
    "gm-8nfe": "the same for 8 calls",
    "gm-4nfe-free": "GM policy for 4 calls, data-free: it reads prompts alone",
    "dx-4nfe": "DX policy, N = 10 on a grid",
    "dx-poly-4nfe": "DX policy, a polynomial of order 10",
    "parallel-free": "parallel decoding, 128 intervals, for 4 calls, data-free",
}
SHIFT, FINAL = 3.2, 0.5


def base(name):
  """What teacher and students share: the batch, the optimizer, the layout of a pod."""
  c = config.base()
  c.trained = ("adaln_out/.*", "head/.*")
  c.batch_size = 256
  c.optimizer.update(learning_rate=1e-4, warmup_steps=100, moments="int8")
  c.ema.start = 100
  c.mesh.update(data=1, fsdp=-1)
  c.log_every, c.checkpoint_every, c.eval_every, c.image_every = 10, 100, 0, 0
  # Of piflow_jax.evaluate: --config.evaluation.features.model=FOLDER and .autoencoder=WORKDIR name them.
  c.evaluation.features = torch_features.clip_config()
  if name == "teacher":
    c.sampling.nfe = 50
    c.trained = (".*",)
    c.method = flow_matching.config(label_dropout=0.0)
    return c
  c.flow = flow.config(shift=SHIFT)
  c.sampling.nfe = 8 if "8nfe" in name else 4
  return c


def student(c, name, *, targets, num_states, num_decay_steps):
  """The policy, the method and the adapters of a recipe."""
  calls, free = c.sampling.nfe, name.endswith("free")
  c.lora = lora.config(rank=256, dropout=0.05, targets=targets)
  if free:
    c.batch_size = 64  # an update walks all four segments, so that it costs the same
  if name.startswith("parallel"):
    c.policy = parallel.config(intervals=128)
    c.method = parallel_decoding.config(min_block=32, max_block=32, label="midpoint", loss_scale=30.0, data_free=True)
    return
  c.method = imitation.config(
      nfe=calls, final_scale=FINAL, total_substeps=128, num_states=num_states, window_substeps=3, loss_scale=30.0,
      num_decay_steps=0 if free else num_decay_steps, data_free=free)
  # Sharpening by calls as the authors sample: clip(0.1 (calls - 1), 0, 1).
  c.policy = gmm.config(components=8, dropout=0.1, temperature=0.1 * (calls - 1))
  if name.startswith("dx"):
    c.policy = dx.config(points=10, segment=1 / (calls - 1 + FINAL), polynomial="poly" in name)


def parsed(argument, file):
  """(recipe or "teacher", shapes of latents) of "RECIPE" or "RECIPE,HEIGHTxWIDTH,..." in pixels. Raises ValueError."""
  name, *sizes = argument.split(",")
  sides = [size.split("x") for size in sizes or ["1024x1024"]]
  good = all(len(pair) == 2 and all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in pair)
             for pair in sides)
  if name not in (*RECIPES, "teacher") or not good:
    raise ValueError(f"{file}:{argument}: choose RECIPE or RECIPE,HEIGHTxWIDTH in multiples of 16, with a recipe of "
                     f"teacher, {', '.join(RECIPES)}; several sizes with commas between")
  return name, tuple((int(height) // 8, int(width) // 8, 16) for height, width in sides)
