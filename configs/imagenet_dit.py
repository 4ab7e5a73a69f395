"""ImageNet-256 latents (32x32x4): the recipes of pi-Flow (arXiv 2510.14974, table of hyper-parameters) and its rivals.

  python -m piflow_jax.main --config=configs/imagenet_dit.py:XL,repa-1nfe --workdir=gs://BUCKET/student \
      --config.teacher.checkpoint=gs://BUCKET/teacher

The argument is SIZE,RECIPE. Sizes: tiny, B, L, XL. Recipes:
  repa-1nfe   GM K=32 at one call from a REPA teacher, 140k updates; paper: FID 2.85 (not run yet here)
  repa-2nfe   the same at two calls, 24k updates; paper: FID 1.97 with a window of 3 (not run yet here)
  fm-1nfe     GM K=32 at one call from an FM-DiT teacher, 140k updates; paper: FID 3.34 (not run yet here)
  dx-1nfe     DX N=10 at one call from a REPA teacher, window of 10 substeps, 40k updates; paper: FID 4.73 (not run yet
              here)
  pdd         parallel decoding (arXiv 2607.26004), Euler over 128 intervals, one model for 1, 2, 4 and 8 calls from a
              REPA teacher; paper: FID 2.73 at one call (not run yet here)
  pdd-midpoint  the same by midpoint over 64 intervals; paper: FID 2.69 (not run yet here)
  meanflow    MeanFlow (arXiv 2505.13447) on a REPA teacher's guided velocity, one model for any number of calls; the
              paper, on data and from scratch: FID 3.43 at one call, 2.20 at two (not run yet here)
  teacher     flow matching of such a teacher from scratch

Ours, and as in repa-1nfe: the updates and the guidance interval of pdd, the updates and the guidance of meanflow.

Data are synthetic latents of the right shapes: speed and memory can be looked at, quality cannot.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import synthetic
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import meanflow
from piflow_jax.distill import parallel_decoding
from piflow_jax.models import dit
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel

_REPA = dict(nfe=1, steps=140_000, scale=3.2, end=0.7, time_scale=1.0, norm_eps=1e-6)
RECIPES = {
    "repa-1nfe": _REPA,
    "repa-2nfe": _REPA | dict(nfe=2, steps=24_000, scale=2.8),
    "fm-1nfe": dict(nfe=1, steps=140_000, scale=2.7, end=0.6, time_scale=1000.0, norm_eps=1e-5),
    "dx-1nfe": _REPA | dict(steps=40_000),
    "pdd": _REPA | dict(scale=2.9),
    "pdd-midpoint": _REPA | dict(scale=2.9),
    "meanflow": _REPA,
}


def get_config(argument="XL,repa-1nfe"):
  size, _, name = argument.partition(",")
  if size not in dit.SIZES or name not in (*RECIPES, "teacher"):
    raise ValueError(f"configs/imagenet_dit.py:{argument}: choose SIZE,RECIPE of {', '.join(dit.SIZES)} and "
                     f"{', '.join(RECIPES)}, teacher")
  c = config.base()
  c.data = synthetic.config(shape=(32, 32, 4), num_classes=1000)
  c.network = dit.config(**dit.SIZES[size])
  c.flow = flow.config()
  c.batch_size = 4096
  if name == "teacher":
    c.method = flow_matching.config()
    c.batch_size, c.steps = 256, 400_000
    c.optimizer.update(learning_rate=1e-4, warmup_steps=1000, b2=0.999, clip_norm=1.0)
    c.sampling.nfe = 50
    return c
  r = RECIPES[name]
  c.steps = r["steps"]
  c.network.update(time_scale=r["time_scale"], mlp_norm_eps=r["norm_eps"])
  c.sampling.nfe = r["nfe"]
  c.teacher = teacher.config(guidance_scale=r["scale"], guidance_interval=(0.0, r["end"]))
  c.policy = gmm.config(components=32)
  c.method = imitation.config(nfe=r["nfe"])
  if name == "dx-1nfe":
    c.policy = dx.config(points=10)
    c.method.window_substeps = 10
  elif name in ("pdd", "pdd-midpoint"):
    intervals = 128 if name == "pdd" else 64
    c.policy = parallel.config(intervals=intervals)
    c.method = parallel_decoding.config(
        label="euler" if name == "pdd" else "midpoint", min_block=intervals // 8, max_block=intervals)
  elif name == "meanflow":
    c.policy = None
    c.method = meanflow.config(target="teacher")
  return c
