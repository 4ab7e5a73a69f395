"""Small runs to convert: their configs, random weights, and workdirs of them."""

import jax
import numpy as np

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import params as params_lib
from piflow_jax import teacher
from piflow_jax import weights as weights_lib
from piflow_jax.convert import trees
from piflow_jax.data import synthetic
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import parallel_decoding
from piflow_jax.models import dit
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel
from tests import golden

FIELDS = {  # what each naming's weights mean
    "release": {}, "diffusers": {"frequency_shift": 1}, "repa": {"mlp_norm_eps": 1e-6}, "dit": {"mlp_norm_eps": 1e-6},
    "sit": {"mlp_norm_eps": 1e-6, "time_scale": -1.0, "time_offset": 1.0}}
FILE = "diffusion_pytorch_model.safetensors"


def config(head="gm", shape=(8, 8, 4), num_classes=10, **network):
  """A run's config on a DiT of two blocks: a "teacher", or a student with the head "gm", "dx" or "parallel"."""
  c = config_lib.base()
  c.data = synthetic.config(shape=shape, num_classes=num_classes)
  c.network = dit.config(**dict(depth=2, width=16, heads=2, time_scale=1.0, dtype="float32", remat="none") | network)
  c.flow = flow.config()
  if head == "teacher":
    c.method = flow_matching.config()
    return c
  c.teacher = teacher.config()
  c.method = imitation.config()
  c.policy = {"gm": gmm.config(components=4, logstd_width=16), "dx": dx.config(points=3),
              "parallel": parallel.config(intervals=6)}[head]
  if head == "parallel":
    c.method = parallel_decoding.config(min_block=1, max_block=6)
  return c


def changed(c, **fields):
  """A copy with fields written a__b."""
  c = c.copy_and_resolve_references()
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
  return c


def shapes(c):
  """Tree of what the config trains, a student's frozen arrays included."""
  _, own = trees.weights_of(c)
  return params_lib.nested(own.leaves)


def random(c, seed=0):
  """Random weights of a config, as a tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes(c))


def save(workdir, tree):
  """Makes a workdir of weights, without a config."""
  weights_lib.save_weights(workdir, params_lib.named_leaves(tree).items())


def weights(c, workdir):
  """The weights of a workdir, as a tree."""
  local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=local), shapes(c))
  return weights_lib.load(workdir, placed, "ema", "--workdir")


def velocity(c):
  """(params, x, t, labels) -> u of a teacher's config."""
  run = build.run(c)
  net = build.velocity_net(run.network, run.data.spec)

  def apply(params, x, t, labels):
    return net.apply(params, x, t, {"label": labels})

  return apply


def state(name):
  """A state dict of the authors' network, in NumPy."""
  return {k.removeprefix("param/"): v for k, v in golden.load(name).items() if k.startswith("param/")}


def equal(got, want):
  """Holds that two trees are the same."""
  got, want = params_lib.named_leaves(got), params_lib.named_leaves(want)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), err_msg=name)
