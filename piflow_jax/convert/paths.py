"""Weights under their own paths: for a network that no other project has names for."""

from piflow_jax import config as config_lib
from piflow_jax.convert import table
from piflow_jax.convert.naming import Naming


def _recognised(keys):
  return any("/" in key for key in keys)


def _rows(weights):
  return [table.Row(path, (path,), table.PLAIN) for path in weights.shapes]


def _about(weights):
  """config.json of the run is all that says how the network is to be built."""
  return {"piflow_jax": {"config": config_lib.to_plain(weights.config)}}


def _stated(about):
  """Fields of the network, but for those that say how it is computed."""
  ours = about.get("piflow_jax")
  config = ours.get("config") if isinstance(ours, dict) else None
  network = config.get("network") if isinstance(config, dict) else None
  return {k: v for k, v in network.items() if k != "dtype"} if isinstance(network, dict) else {}


NAMINGS = {"paths": Naming("piflow_jax's own paths", _recognised, _rows, _about, students=True, stated=_stated)}
