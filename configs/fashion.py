"""Fashion-MNIST, 28 x 28 grey: the whole path on 60,000 real pictures, within two hours on a laptop.

  make fashion    # FASHION=FOLDER of the four IDX files; Debian's dataset-fashion-mnist puts them where it looks

or, step by step:
  python -m piflow_jax.main --config=configs/fashion.py:teacher --workdir=runs/fashion/teacher
  python -m piflow_jax.evaluation.compare --config=configs/fashion.py --workdir=runs/fashion/compare \
      --methods=student,parallel,meanflow --calls=1,2 --seeds=1

The argument is ROLE or ROLE,NFE, the network calls that a student is trained for (1). Roles: teacher (flow matching);
student (GM policy, K = 8); parallel (parallel decoding, one model for any of its numbers of calls); meanflow (MeanFlow
on the teacher's velocity, likewise). Samples are compared with the 10,000 held-out pictures by the features of a small
classifier trained on the others.

Hardware: 2 CPU cores, or a GPU: six minutes on an H100, figures in docs/results.md. Not run to the end on a CPU yet.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import idx
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import meanflow
from piflow_jax.distill import parallel_decoding
from piflow_jax.evaluation import classifier
from piflow_jax.models import dit
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel

ROLES = ("teacher", "student", "parallel", "meanflow")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def get_config(argument="student"):
  role, _, nfe = argument.partition(",")
  if role not in ROLES or not (nfe or "1").isdecimal() or not int(nfe or 1):
    raise ValueError(f"configs/fashion.py:{argument}: choose ROLE or ROLE,NFE with a role of {', '.join(ROLES)}")
  c = config.base()
  c.batch_size = 128
  c.data = idx.config(path="/usr/share/datasets/fashion-mnist", classes=CLASSES)
  # 1.3 million parameters. The time embedding takes the noise level itself, as configs/digits.py says why.
  c.network = dit.config(depth=4, width=128, heads=4, patch=4, time_scale=1.0, dtype="float32", remat="none", unroll=4)
  c.flow = flow.config()
  c.evaluation.features = classifier.config(records=60_000, steps=2000)
  c.evaluation.samples = 10_000
  c.optimizer.update(learning_rate=1e-3, warmup_steps=200, clip_norm=1.0, schedule="cosine")
  c.ema.start = 200
  c.eval_every = c.image_every = c.checkpoint_every = 500
  if role == "teacher":
    c.method = flow_matching.config()
    c.steps = 4000
    c.sampling.nfe = 32
    return c
  c.steps = 600
  c.teacher = teacher.config(checkpoint="runs/fashion/teacher")
  c.sampling.nfe = int(nfe or 1)
  if role == "student":
    c.policy = gmm.config(components=8, logstd_width=128)
    c.method = imitation.config(nfe=c.sampling.nfe)
  elif role == "parallel":
    c.policy = parallel.config(intervals=128)
    c.method = parallel_decoding.config(min_block=32, max_block=128, label="midpoint")
  else:
    # As on the digits: docs/results.md, "MeanFlow's settings".
    c.method = meanflow.config(target="teacher", ratio=0.75, logit_mean=0.0, logit_std=2.0, norm_power=0.0)
  return c
