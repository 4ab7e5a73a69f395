"""Text to image in small: a FLUX.1-shaped teacher on emoji and their names, and few-step students of it with adapters.

  make emoji-fetch emoji      (pictures and encoder, then all of what follows; docs/text_to_image.md)

  python -m piflow_jax.main --config=configs/emoji.py:teacher --workdir=runs/emoji/teacher
  python -m piflow_jax.main --config=configs/emoji.py:student --workdir=runs/emoji/student
  python -m piflow_jax.sample --workdir=runs/emoji/student --prompt="a green apple" --out=apple.png

Pictures of 32 x 32 pixels, texts of all-MiniLM-L6-v2 (384 wide), 2.4 million parameters. Students are data-free: they
see prompts only, and walk from noise along their own policies. docs/text_to_image.md has minutes and figures.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import lora
from piflow_jax import teacher
from piflow_jax.data import texts
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import parallel_decoding
from piflow_jax.evaluation import torch_features
from piflow_jax.models import flux
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel

ROLES = ("teacher", "student", "dx", "parallel")
_SHIFT, _NFE, _FINAL = 2.0, 4, 0.5  # f = 0.5 as of FLUX.1's students: the last segment is half as long


def get_config(role="student"):
  """The config of one of ROLES."""
  if role not in ROLES:
    raise ValueError(f"{role!r} is none of {', '.join(ROLES)}; choose one, as in configs/emoji.py:student")
  c = config.base()
  # Names have 3 to 12 tokens.
  c.data = texts.config(path="runs/emoji/cache", held_out="runs/emoji/held_out", tokens=16, shape=(32, 32, 3),
                        width=384, pooled=384, encoder="auto:runs/emoji/encoder")
  c.network = flux.config(double_depth=2, single_depth=4, heads=4, axes=(8, 12, 12), patch=4, guidance=0.0,
                          remat="none", dtype="float32", unroll=4)
  c.flow = flow.config(shift=_SHIFT)
  c.batch_size = 64
  c.log_every, c.checkpoint_every, c.eval_every, c.image_every = 20, 250, 500, 500
  c.sampling.images = 64
  c.evaluation.features = torch_features.efficientnet_config()
  if role == "teacher":
    return _teacher(c)
  c.teacher = teacher.config(checkpoint="runs/emoji/teacher", guidance_scale=3.0)
  c.lora = lora.config(rank=32, targets=("mlp_in", "mlp_out", "single_blocks/out", "time_in", "time_out"))
  c.trained = ("adaln_out/.*", "head/.*")
  c.steps, c.batch_size = 300, 32
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.ema.start = 5e-4, 30, 30
  c.sampling.nfe = _NFE
  if role == "parallel":
    c.policy = parallel.config(intervals=64)
    c.method = parallel_decoding.config(min_block=16, max_block=16, data_free=True, loss_scale=30.0)
    return c.lock()
  c.method = imitation.config(nfe=_NFE, final_scale=_FINAL, num_states=2, window_substeps=3, loss_scale=30.0,
                              total_substeps=64, data_free=True)
  c.policy = gmm.config(components=8, logstd_width=256, dropout=0.1, temperature=0.3)
  if role == "dx":
    c.policy = dx.config(points=10)
  return c.lock()


def _teacher(c):
  c.method = flow_matching.config(label_dropout=0.1, logit_normal=True)
  c.steps = 3000
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-3, 100
  c.optimizer.schedule = "cosine"
  c.ema.start = 100
  c.sampling.nfe = 32
  return c.lock()
