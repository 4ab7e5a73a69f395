"""ImageNet-256 latents (32x32x4): the recipes of pi-Flow (arXiv 2510.14974, tables 1, 2, 5) and of its rivals.

  python -m piflow_jax.main --config=configs/imagenet_dit.py:XL,repa-1nfe,cache --config.data.path=CACHE \
      --config.teacher.checkpoint=gs://BUCKET/teacher --workdir=gs://BUCKET/student
  python -m piflow_jax.evaluate --workdir=gs://BUCKET/student --autoencoder=AUTOENCODER --inception=FILE.pth \
      --reference=VIRTUAL_imagenet256_labeled.npz --protocol=adm

The argument is SIZE,RECIPE or SIZE,RECIPE,cache. Sizes: tiny, B, L, XL. With "cache" the data are a cache of latents
(docs/imagenet.md); without, synthetic ones of the right shapes, for plans and for speed. docs/imagenet.md has each
recipe's hours on four slices. FID is that of the paper, XL, 50,000 samples by the protocol "adm" unless said
otherwise; none of them has been run here yet.

  recipe               what                                                       updates   expect
  repa-1nfe            GM K=32, one call, REPA teacher                            140k      FID 2.85
  repa-1nfe-40k        the same, shorter                                          40k       FID 3.08
  repa-1nfe-k8         GM K=8                                                     40k       FID 3.07
  repa-2nfe            two calls, a window of 3 substeps                          24k       FID 1.97
  fm-1nfe              GM K=32, one call, FM-DiT teacher                          140k      FID 3.34
  fm-1nfe-40k          the same, shorter                                          40k       FID 3.65
  fm-1nfe-nodropout    without dropout of components                              40k       FID 4.14
  dx-1nfe              DX N=10, window of 10 substeps, REPA teacher               40k       FID 4.73
  dx20-1nfe            DX N=20, window of 5                                       40k       FID 4.44
  dx40-1nfe            DX N=40, window of 3                                       40k       FID 4.90
  pdd-paper            parallel decoding (arXiv 2607.26004), Euler labels over
                       two of 128 intervals; one model for 1, 2, 4, 8 calls       300k      FID 2.73 at one call
  pdd-midpoint-paper   the same by midpoint labels over 64 intervals              300k      FID 2.69 at one call
  pdd, pdd-midpoint    the same at repa-1nfe's batch and updates: ours            140k      not known
  meanflow             MeanFlow (arXiv 2505.13447) on a REPA teacher's guided
                       velocity, any number of calls: ours                        140k      not known
  meanflow-data        MeanFlow on data, from scratch, 240 epochs of batch 256    1.2M      FID 3.43, 2.20 at two calls
  imf                  improved MeanFlow (arXiv 2512.02012) on a teacher: ours    140k      not known
  imf-data             improved MeanFlow on data, from scratch                    1.2M      FID 1.72 by its protocol
  teacher              flow matching of such a teacher from scratch               400k      not known

The batch is 4096; 2048 for the papers' parallel decoding, 256 on data and for the teacher. Parallel decoding is
guided over REPA's interval, MeanFlow and its improvement on data by one guidance scale: their papers mix guided
targets in other ways (improved MeanFlow also conditions on the scale, in a network of its own, which is not here),
so that their figures are what they reached, not what these recipes must.
"""

from piflow_jax import config
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import latents
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
_FM = dict(nfe=1, steps=140_000, scale=2.7, end=0.6, time_scale=1000.0, norm_eps=1e-5)
_SHORT = dict(steps=40_000)
_PDD = _REPA | dict(scale=2.9)
_DATA = dict(nfe=1, steps=1_200_000, time_scale=1000.0, norm_eps=1e-6)
RECIPES = {
    "repa-1nfe": _REPA,
    "repa-1nfe-40k": _REPA | _SHORT,
    "repa-1nfe-k8": _REPA | _SHORT | dict(components=8),
    "repa-2nfe": _REPA | dict(nfe=2, steps=24_000, scale=2.8, window=3),
    "fm-1nfe": _FM,
    "fm-1nfe-40k": _FM | _SHORT,
    "fm-1nfe-nodropout": _FM | _SHORT | dict(dropout=0.0),
    "dx-1nfe": _REPA | _SHORT | dict(points=10, window=10),
    "dx20-1nfe": _REPA | _SHORT | dict(points=20, window=5),
    "dx40-1nfe": _REPA | _SHORT | dict(points=40, window=3),
    "pdd": _PDD | dict(intervals=128),
    "pdd-midpoint": _PDD | dict(intervals=64),
    "pdd-paper": _PDD | dict(intervals=128, steps=300_000, batch=2048),
    "pdd-midpoint-paper": _PDD | dict(intervals=64, steps=300_000, batch=2048),
    "meanflow": _REPA | dict(improved=False),
    "meanflow-data": _DATA | dict(improved=False),
    "imf": _REPA | dict(improved=True),
    "imf-data": _DATA | dict(improved=True),
}


def get_config(argument="XL,repa-1nfe"):
  size, name, *cache = argument.split(",") if "," in argument else (argument, "")
  if size not in dit.SIZES or name not in (*RECIPES, "teacher") or cache not in ([], ["cache"]):
    raise ValueError(f"configs/imagenet_dit.py:{argument}: choose SIZE,RECIPE or SIZE,RECIPE,cache of "
                     f"{', '.join(dit.SIZES)} and {', '.join(RECIPES)}, teacher")
  c = config.base()
  c.data = latents.config() if cache else synthetic.config(shape=(32, 32, 4), num_classes=1000)
  c.network = dit.config(**dit.SIZES[size])
  c.flow = flow.config()
  if name == "teacher" or "scale" not in RECIPES[name]:
    return _on_data(c, RECIPES.get(name))
  r = RECIPES[name]
  c.batch_size, c.steps = r.get("batch", 4096), r["steps"]
  c.network.update(time_scale=r["time_scale"], mlp_norm_eps=r["norm_eps"])
  c.sampling.nfe = r["nfe"]
  c.teacher = teacher.config(guidance_scale=r["scale"], guidance_interval=(0.0, r["end"]))
  if "improved" in r:
    c.method = meanflow.config(target="teacher", improved=r["improved"])
    return c
  if "intervals" in r:
    c.policy = parallel.config(intervals=r["intervals"])
    c.method = parallel_decoding.config(label="euler" if r["intervals"] == 128 else "midpoint",
                                        min_block=r["intervals"] // 8, max_block=r["intervals"])
    return c
  c.policy = dx.config(points=r["points"]) if "points" in r else gmm.config(components=r.get("components", 32))
  if "dropout" in r:
    c.policy.dropout = r["dropout"]
  c.method = imitation.config(nfe=r["nfe"], window_substeps=r.get("window", 0))
  return c


def _on_data(c, recipe):
  """The teacher's recipe, or that of a few-step model that is trained as one."""
  c.batch_size, c.steps = 256, 400_000
  c.optimizer.update(learning_rate=1e-4, warmup_steps=1000, b2=0.999, clip_norm=1.0)
  if recipe is None:
    c.method = flow_matching.config()
    c.sampling.nfe = 50
    return c
  c.steps = recipe["steps"]
  c.optimizer.b2 = 0.95
  c.network.update(time_scale=recipe["time_scale"], mlp_norm_eps=recipe["norm_eps"])
  c.method = meanflow.config(target="data", improved=recipe["improved"], ratio=0.5 if recipe["improved"] else 0.25,
                             guidance_scale=2.0)
  c.sampling.nfe = recipe["nfe"]
  return c
