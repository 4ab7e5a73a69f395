"""Real 8x8 handwritten digits on a laptop: a teacher by flow matching, then a few-step student.

  python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/digits/teacher
  python -m piflow_jax.main --config=configs/digits.py:student --workdir=runs/digits/student
  python -m piflow_jax.evaluation.run --config=configs/digits.py:student --workdir=runs/digits/student

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

Guided distillation: add --config.teacher.guidance_scale=2 to the student's two commands, with a workdir of its own.
Hardware: 2 CPU cores; time and figures in README.md.
"""

from configs import base
from piflow_jax import build
from piflow_jax.data import digits
from piflow_jax.evaluation import digit_features
from piflow_jax.policy import dx
from piflow_jax.policy import parallel

ROLES = ("teacher", "student", "gm32", "dx", "dx-no-window", "parallel", "meanflow", "improved-meanflow", "meanflow-data")


def get_config(argument="student"):
  role, _, nfe = argument.partition(",")
  if role not in ROLES or not (nfe or "1").isdigit():
    raise ValueError(f"configs/digits.py:{argument}: choose ROLE or ROLE,NFE with a role of {', '.join(ROLES)}")
  c = base.get_config()
  c.batch_size = 128
  c.data.source, c.data.shape, c.data.num_classes = digits.source, digits.SHAPE, digits.NUM_CLASSES
  # The noise level itself into the time embedding: MeanFlow differentiates by it, and a factor of 1000 would drown that.
  c.network.update(depth=3, width=96, heads=3, time_scale=1.0, dtype="float32", remat="none", unroll=3)
  c.policy.update(components=8, logstd_width=128)
  c.evaluation.features = digit_features.extractor
  c.optimizer.update(learning_rate=2e-3, warmup_steps=100, clip_norm=1.0, schedule="cosine")
  c.ema.start = 100
  c.eval_every = c.image_every = c.checkpoint_every = 250
  if role == "teacher":
    c.method = build.flow_matching
    c.steps = 3000
    c.sampling.nfe = 32
    return c
  c.steps = 900
  c.teacher.checkpoint = "runs/digits/teacher"
  c.flow.nfe = c.sampling.nfe = int(nfe or 1)
  if role == "gm32":
    c.policy.components = 32
  elif role in ("dx", "dx-no-window"):
    c.policy.update(make=dx.DXHead, points=10)
    # What lies between two grid points, of the 128 / NFE substeps of a segment.
    c.imitation.window_substeps = max(round(10 / c.flow.nfe), 1) if role == "dx" else 0
  elif role == "parallel":
    c.method = build.parallel_decoding
    c.policy.update(make=parallel.ParallelHead, intervals=128)
    c.imitation.label = "midpoint"
    c.parallel_decoding.update(min_block=32, max_block=128)
  elif role != "student":
    c.method = build.meanflow
    c.meanflow.improved = role == "improved-meanflow"
    c.meanflow.target = "data" if role == "meanflow-data" else "teacher"
    # Better here than the published ratio of 0.25, logit-normal(-0.4, 1) and adaptive weight: BUILD_NOTES.md has figures.
    c.meanflow.update(ratio=0.75, logit_mean=0.0, logit_std=2.0, norm_power=0.0)
  return c
