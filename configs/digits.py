"""Real 8x8 handwritten digits on a laptop: a teacher by flow matching, then a few-step student.

  python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/digits/teacher
  python -m piflow_jax.main --config=configs/digits.py:student --workdir=runs/digits/student
  python -m piflow_jax.evaluate --workdir=runs/digits/student

The argument is ROLE or ROLE,NFE, the network calls that a student is trained for (1). Roles:
  teacher            flow matching
  student            GM policy, K = 8
  gm32               GM policy, K = 32
  dx                 DX policy, N = 10 on a grid, micro-window of 10 / NFE substeps
  dx-no-window       the same without the window
  parallel           parallel decoding, 128 intervals; one model for 1, 2 and 4 calls
  meanflow           MeanFlow on the teacher's velocity; one model for any number of calls
  improved-meanflow  improved MeanFlow, likewise
  meanflow-data      MeanFlow as published, on data
python -m piflow_jax.evaluation.compare trains and measures them all.

Guided distillation: add --config.teacher.guidance_scale=2 to the student's training, with a workdir of its own.
Hardware: 2 CPU cores; time and figures in README.md and docs/results.md.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import digits
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import meanflow
from piflow_jax.distill import parallel_decoding
from piflow_jax.evaluation import digit_features
from piflow_jax.models import dit
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel

ROLES = ("teacher", "student", "gm32", "dx", "dx-no-window", "parallel", "meanflow", "improved-meanflow",
         "meanflow-data")

# Text, metric, row, row that it is divided by, bound: what a good distillation shows. See evaluation/checks.py. Other
# seeds, machines and noises stay within the bounds: docs/results.md, "How far the figures move".
CHECKS = (
    ("Frechet distance of the student over that of the teacher at 128 calls", "frechet", "student", "teacher@128",
     "<=", 1.25),
    ("Frechet distance of the student over that of the teacher at 4 calls", "frechet", "student", "teacher@4",
     "<=", 0.8),
    ("distance to the teacher's samples of the student over that of the teacher at 4 calls", "frechet_to_teacher",
     "student", "teacher@4", "<=", 1.0),
    ("accuracy of the student's conditioned class", "accuracy", "student", "", ">=", 0.94),
    ("diversity of the student over the teacher's", "diversity", "student", "teacher@128", ">=", 0.9),
    ("diversity of the student over the teacher's", "diversity", "student", "teacher@128", "<=", 1.1),
    ("endpoint error of the student", "endpoint_error", "student", "", "<=", 0.25),
)


def get_config(argument="student"):
  role, _, nfe = argument.partition(",")
  if role not in ROLES or not (nfe or "1").isdigit() or not int(nfe or 1):
    raise ValueError(f"configs/digits.py:{argument}: choose ROLE or ROLE,NFE with a role of {', '.join(ROLES)}")
  c = config.base()
  c.batch_size = 128
  c.data = digits.config()
  # The time embedding takes the noise level itself: MeanFlow differentiates by it, and a factor of 1000 would swamp
  # the derivative.
  c.network = dit.config(depth=3, width=96, heads=3, time_scale=1.0, dtype="float32", remat="none", unroll=3)
  c.flow = flow.config()
  c.evaluation.features = digit_features.config()
  c.optimizer.update(learning_rate=2e-3, warmup_steps=100, clip_norm=1.0, schedule="cosine")
  c.ema.start = 100
  c.eval_every = c.image_every = c.checkpoint_every = 250
  if role == "teacher":
    c.method = flow_matching.config()
    c.steps = 3000
    c.sampling.nfe = 32
    return c
  c.steps = 900
  c.teacher = teacher.config(checkpoint="runs/digits/teacher")
  c.sampling.nfe = calls = int(nfe or 1)
  c.evaluation.checks = CHECKS
  c.method = imitation.config(nfe=calls)
  if role in ("student", "gm32"):
    c.policy = gmm.config(components=32 if role == "gm32" else 8, logstd_width=128)
  elif role in ("dx", "dx-no-window"):
    c.policy = dx.config(points=10)
    # The number of substeps between two grid points; a segment has 128 / NFE.
    c.method.window_substeps = max(round(10 / calls), 1) if role == "dx" else 0
  elif role == "parallel":
    c.policy = parallel.config(intervals=128)
    c.method = parallel_decoding.config(min_block=32, max_block=128, label="midpoint")
  else:
    # These do better here than the published ratio of 0.25, logit-normal(-0.4, 1) and adaptive weight: see
    # docs/results.md.
    c.method = meanflow.config(
        improved=role == "improved-meanflow", target="data" if role == "meanflow-data" else "teacher",
        ratio=0.75, logit_mean=0.0, logit_std=2.0, norm_power=0.0)
  return c
