"""Real 8x8 handwritten digits on a laptop: a teacher by flow matching, then a one-call student.

  python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/digits/teacher
  python -m piflow_jax.main --config=configs/digits.py:student --workdir=runs/digits/student
  python -m piflow_jax.evaluation.run --config=configs/digits.py:student --workdir=runs/digits/student

Guided distillation: add --config.teacher.guidance_scale=2 to the last two, with a workdir of its own.
Hardware: 2 CPU cores; time and figures in README.md.
"""

from configs import base
from piflow_jax import build
from piflow_jax.data import digits
from piflow_jax.evaluation import digit_features


def get_config(role="student"):
  if role not in ("teacher", "student"):
    raise ValueError(f"configs/digits.py:{role}: choose :teacher or :student")
  c = base.get_config()
  c.batch_size = 128
  c.data.source, c.data.shape, c.data.num_classes = digits.source, digits.SHAPE, digits.NUM_CLASSES
  c.network.update(depth=3, width=96, heads=3, dtype="float32", remat=False, unroll=3)
  c.policy.update(components=8, logstd_width=128)
  c.evaluation.features = digit_features.extractor
  c.optimizer.update(learning_rate=2e-3, warmup_steps=100, clip_norm=1.0, schedule="cosine")
  c.ema.start = 100
  c.eval_every = c.image_every = c.checkpoint_every = 250
  if role == "teacher":
    c.method = build.flow_matching
    c.steps = 3000
    c.sampling.nfe = 32
  else:
    c.steps = 900
    c.teacher.checkpoint = "runs/digits/teacher"
  return c
