"""Your own pictures: a teacher by flow matching, then a few-step student.

  python -m piflow_jax.main --config=configs/images.py:teacher --config.data.path=PICTURES --workdir=runs/images/teacher
  python -m piflow_jax.main --config=configs/images.py:student --config.data.path=PICTURES --workdir=runs/images/student
  python -m piflow_jax.sample --workdir=runs/images/student --out=samples.png
  python -m piflow_jax.evaluate --workdir=runs/images/student

PICTURES is a folder of class folders (labels), a folder of pictures (none), or an .npz with images uint8 [n, H, W, C]
and, if there are any, labels [n]: see piflow_jax/data/images.py. The argument is ROLE or ROLE,NFE, the network calls
that a student is trained for (1). Roles: teacher; student (GM policy, K = 8), which needs its teacher's data fields.

Sized for 32 x 32 pixels on a laptop. With a GPU and more pixels, for both commands:
  --config.data.size=64 --config.network.depth=12 --config.network.width=512 --config.network.heads=8
  --config.network.dtype=bfloat16 --config.flow.shift=2 --config.steps=100000
Labels can guide the student: --config.teacher.guidance_scale=2, for the student's command. Where there are none, the
teacher has none to drop: --config.method.label_dropout=0, for the teacher's command.
Evaluation compares by a small classifier trained on the labels, or without labels by principal components.

Hardware: 2 CPU cores or a GPU. Not run yet to the end.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import images
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.evaluation import features
from piflow_jax.models import dit
from piflow_jax.policy import gmm

ROLES = ("teacher", "student")


def get_config(argument="student"):
  role, _, nfe = argument.partition(",")
  if role not in ROLES or not (nfe or "1").isdecimal() or not int(nfe or 1):
    raise ValueError(f"configs/images.py:{argument}: choose ROLE or ROLE,NFE with a role of {', '.join(ROLES)}")
  c = config.base()
  c.batch_size = 128
  c.data = images.config()
  c.network = dit.config(depth=6, width=256, heads=4, patch=4, time_scale=1.0, dtype="float32", remat="none", unroll=6)
  c.flow = flow.config()
  c.evaluation.features = features.auto_config()
  c.optimizer.update(learning_rate=5e-4, warmup_steps=500, clip_norm=1.0, schedule="cosine")
  if role == "teacher":
    c.method = flow_matching.config()
    c.steps = 20_000
    c.sampling.nfe = 32
    return c
  c.steps = 3_000
  c.teacher = teacher.config(checkpoint="runs/images/teacher")
  c.policy = gmm.config(components=8, logstd_width=256)
  c.method = imitation.config(nfe=int(nfe or 1))
  c.sampling.nfe = c.method.nfe
  return c
