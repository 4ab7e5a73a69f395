"""A converted autoencoder in use: from its workdir to functions of images and latents."""

import json

from etils import epath
import jax

from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax.models import autoencoder


def load(workdir, sharding, field="--autoencoder"):
  """(net, params, scales) of an autoencoder that `python -m piflow_jax.convert from-torch` made a workdir of.

  Args:
    workdir: local or gs://.
    sharding: of all parameters.
    field: name of what gave the workdir, for the messages.
  Returns:
    models.autoencoder.Autoencoder, its parameters, and the arguments of `to_latents` and `from_latents`.
  Raises:
    errors.UserError: there is no autoencoder, or another version's.
  """
  path = epath.Path(workdir) / autoencoder.FILE
  if not path.exists():
    raise errors.UserError(f"{field}: {str(workdir)!r} holds no autoencoder (no {autoencoder.FILE}); make one "
                           "of diffusers' by python -m piflow_jax.convert from-torch")
  try:
    known = json.loads(path.read_text())
    settings, scales = known["settings"], known["scales"]
    net = autoencoder.Autoencoder(**settings | {"widths": tuple(settings["widths"])})
  except (KeyError, TypeError, ValueError) as e:
    raise errors.UserError(f"{field}: {path} is not of this program ({type(e).__name__}: {e}); convert it again") from e
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), autoencoder.shapes(net))
  return net, checkpoint.load_weights(workdir, placed, "ema", field), scales
