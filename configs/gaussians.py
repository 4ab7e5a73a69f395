"""A teacher without error: data are a Gaussian mixture whose flow is known, end points and all.

  python -m piflow_jax.main --config=configs/gaussians.py:gm,16 --workdir=runs/gaussians/gm-16
  python -m piflow_jax.evaluation.analytic --config=configs/gaussians.py --workdir=runs/gaussians

The argument is POLICY,N: gm and its components K, or dx and its points N. The second command trains a row of each.
Hardware: 2 CPU cores; time and figures in docs/results.md.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import gaussians
from piflow_jax.distill import imitation
from piflow_jax.models import dit
from piflow_jax.policy import dx
from piflow_jax.policy import gmm


def get_config(argument="gm,16"):
  policy, _, n = argument.partition(",")
  if policy not in ("gm", "dx") or not n.isdigit() or not int(n):
    raise ValueError(f"configs/gaussians.py:{argument}: choose POLICY,N with a policy of gm, dx")
  c = config.base()
  c.steps = 1600
  c.data = gaussians.config(shape=(1, 1, 2), num_classes=1)  # points in a plane
  c.teacher = teacher.exact_config(mixture=gaussians.mixture)
  c.network = dit.config(depth=2, width=64, heads=2, patch=1, time_scale=1.0, dtype="float32", remat="none", unroll=2)
  c.flow = flow.config()
  c.policy = gmm.config(components=int(n), logstd_width=64, dropout=0.0)
  c.method = imitation.config(total_substeps=64)
  if policy == "dx":
    c.policy = dx.config(points=int(n))
    c.method.window_substeps = 64 // int(n)
  c.optimizer.update(learning_rate=1e-3, warmup_steps=100, clip_norm=1.0)
  c.ema.start = 100
  c.eval_every = c.image_every = 0
  c.checkpoint_every = 800
  return c
