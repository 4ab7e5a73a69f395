"""Which tree of a config's some weights are, and whether the config says of them what their files say."""

import jax

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import params as params_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import naming as naming_lib
from piflow_jax.convert import table
from piflow_jax.distill import flow_matching

_TEACHER_CALLS = 50  # steps of a teacher whose config is made of a student's
_STUDENTS = ("network.", "policy.", "flow.", "method.nfe", "method.final_scale", "method.total_substeps")


def networks_of(config):
  """The nouns of networks whose weights a config may be given for. Raises errors.UserError: there is none."""
  if config.network is None:
    raise errors.UserError("config.network: is not set; weights are a network's")
  own = config.teacher.get("network") if config.teacher is not None else None
  return [config.network] if own is None else [own, config.network]


def weights_of(config):
  """(teacher, own): Weights of the network that the config's teacher is, or would be, and of what the config trains."""
  run = build.run(config)
  if run.data.found:  # with the names of classes, say, samples are drawn where the data are not
    config = config.copy_and_resolve_references()
    config.data.update(run.data.found)
  spec, method, net, field = run.data.spec, run.method, run.network, "config.network"
  noun = networks_of(config)[0]
  if noun is not config.network:
    net, field = noun.make(spec, **config_lib.fields_of(noun)), "config.teacher.network"
  velocity = jax.eval_shape(build.velocity_net(net, spec).init, jax.random.key(0))
  teacher = naming_lib.Weights(
      "teacher", config=config, network=noun, field=field, spec=spec, clock=flow.Clock.of_shift(method.clock.shift),
      per_call=False, leaves=params_lib.named_leaves(velocity))
  trained = params_lib.named_leaves(jax.eval_shape(method.init, jax.random.key(0), run.teacher_shapes))
  own = naming_lib.Weights(
      "student", config=config, network=config.network, field="config.network", spec=spec,
      clock=method.clock if method.per_call else method.clock.replace(nfe=config.sampling.nfe),
      per_call=method.per_call, leaves=trained)
  if run.student is not None:
    head, frozen = run.student.head, params_lib.named_leaves(run.student.frozen)
    policy = head.export_config(method.clock) if hasattr(head, "export_config") else None
    return teacher, own._replace(leaves=trained | frozen, frozen=frozenset(frozen), head=head, policy=policy)
  return teacher, teacher if own.shapes == teacher.shapes else own


def of_file(source, teacher, own, stored, rows):
  """The Weights whose output layers a file has.

  Args:
    source: `files.Source`, less what no tree has.
    teacher, own: of `weights_of`.
    stored: of `naming.stored_policy`.
    rows: of the naming for the teacher, with those of all heads.
  Raises:
    errors.UserError: the file is a student, the config is none's.
  """
  names = {key: row.here for row in rows for key in row.there}
  heads = {names.get(key, key) for key in source.shapes if names.get(key, key).startswith("head/")}
  others = heads - teacher.leaves.keys() | {key for key in source.shapes if ".lora_A." in key}
  alone = stored is None and not source.config  # the shapes alone have to say
  ours = source.config.get("piflow_jax")
  said = isinstance(ours, dict) and ours.get("role") == "student"
  if not (stored or said or others or (alone and _has_more(source, teacher, own, rows))):
    return teacher
  if own is teacher or (own.head is None and (stored or others)):
    raise errors.UserError(f"--config: {source.where} is a student; give a student's config")
  return own


def _has_more(source, teacher, own, rows):
  """Whether a file has a student's output layer: as many rows as the config's, or a multiple of a velocity's."""
  there = {row.here: row.there[0] for row in rows}
  found = source.shapes.get(there.get("head/out/kernel"))
  if found is None or "head/out/kernel" not in own.leaves or own.head is None:
    return False
  wanted = [entry.shape_there for weights in (own, teacher)
            for entry in table.entries(rows, {"head/out/kernel": weights.shapes["head/out/kernel"]}, "")]
  if found == wanted[0]:
    return True
  patches = table.entries(rows, {k: v for k, v in teacher.shapes.items() if k == "patch_embed/kernel"}, "")
  same_patches = all(source.shapes.get(key) == entry.shape_there for entry in patches for key in entry.keys)
  return same_patches and found[1:] == wanted[1][1:] and found[0] > wanted[1][0] and not found[0] % wanted[1][0]


def check_file(source, weights, stored, latents):
  """Hold what a file says of its policy, its clock and its latents against the config. Raises errors.UserError."""
  if weights.role == "student":
    mine = weights.policy or {"type": None}
    differ = [f"{k} is {mine.get(k)!r}, the file's {str(v)[:99]!r}" if isinstance(v, str) else
              f"{k} is {mine.get(k)!r}, the file's {str(v)[:99]}"
              for k, v in (stored or {}).items() if mine.get(k, v) != v]
    if differ:
      raise errors.UserError(f"--config: its policy is not the one of {source.where}: {'; '.join(differ)}; set "
                             "config.policy and config.flow to the file's")
  ours, differ = source.config.get("piflow_jax"), []
  if weights.role == "student" and isinstance(ours, dict):
    clock = weights.clock
    known = {"the shift of config.flow": ("shift", float(clock.shift)),
             "config.method.final_scale": ("final_scale", clock.final_scale)}
    known |= {"config.method.nfe": ("nfe", clock.nfe)} if weights.per_call else {}
    differ += [f"{field} is {mine}, the file's {str(ours[name])[:99]}" for field, (name, mine) in known.items()
               if ours.get(name, mine) != mine]
  if latents is not None and latents != list(weights.spec.x_0):
    differ.append(f"x_0 of config.data is {tuple(weights.spec.x_0)}, the file's {str(latents)[:99]}")
  if differ:
    raise errors.UserError(f"--config: it is not what config.json beside {source.where} says: {'; '.join(differ)}; set "
                           "the file's, or take config.json away")


def check_network(weights, what, fields):
  """Hold fields of the network that no shape tells against the config. Raises errors.UserError."""
  mine, free = config_lib.to_plain(weights.network), config_lib.free_of(weights.network)
  wrong = [f"{weights.field}.{k} is {mine.get(k)}, set {str(v)[:99]}" for k, v in fields.items()
           if k not in free and mine.get(k) != v]
  if wrong:
    raise errors.UserError(f"--config: for {what}: {'; '.join(wrong)}")


def unsaid(weights, stored):
  """A line on those arguments of a student's policy that its file leaves to the config."""
  mine = weights.policy or {}
  found = [f"{k} {v}" for k, v in mine.items() if k not in (stored or {}) and (k != "type" or v != "GMFlow")]
  return f"policy, by the config alone: {', '.join(found)}" if found else ""


def of_run(workdir, config, shapes):
  """The Weights that the checkpoints of a workdir hold.

  Args:
    workdir: local or gs://.
    config: given by hand, or None: the workdir's own.
    shapes: {path: shape} in the newest checkpoint.
  Raises:
    errors.UserError: no config, another one than the workdir's, or one that they do not fit.
  """
  known = workdir_lib.plain(workdir) if config is not None else None
  config = workdir_lib.read(workdir) if config is None else config
  teacher, own = weights_of(config)
  # `from_torch` makes whole students; older versions took a student's config for a teacher's weights too.
  candidates = [own, own._replace(frozen=frozenset()), teacher]
  weights = next((w for w in candidates if w.stored == shapes), None)
  if weights is None:
    raise errors.UserError(f"--workdir: {str(workdir)!r} does not fit the config's network: "
                           f"{_misfit(own, teacher, shapes)}; give the config that it was trained with")
  if known is not None:
    _check_known(known, weights, workdir)
  return weights


def _misfit(own, teacher, shapes):
  nearest = min((own, teacher), key=lambda weights: len(weights.stored.items() ^ shapes.items()))
  said = []
  for naming in naming_lib.of_network(nearest.network.make).values():
    rows = naming.rows(nearest)
    named = {row.here for row in rows}
    if not shapes.keys() | nearest.shapes.keys() <= named:
      continue
    mine, theirs = ({key: entry.shape_there for entry in table.entries(rows, s, "") for key in entry.keys}
                    for s in (nearest.shapes, shapes))
    said = table.hints(rows, naming.sizes(nearest), mine, theirs)
    break
  return "; ".join([*said, table.difference(nearest.stored, shapes)])


def _check_known(known, weights, workdir):
  """Hold a config that was given by hand against the one that a workdir was made with."""
  config, new = weights.config, config_lib.to_plain(weights.config)
  if weights.role == "teacher":
    new, only = {"network": config_lib.to_plain(weights.network)}, ("network.",)
  else:
    only = _STUDENTS
  free = [f"network.{k}" for k in (*config_lib.free_of(weights.network), "dtype")]
  for name in ("policy", "flow"):
    free += [f"{name}.{k}" for k in config_lib.free_of(config[name])] if config[name] is not None else []
  if found := workdir_lib.differences(known, new, free=tuple(free), only=only):
    raise errors.UserError(f"--config: {str(workdir)!r} was made by another config ({found}); leave --config out, and "
                           "the workdir's own is taken")


def config_for(weights, own):
  """The config of a run that would have these weights in its checkpoints; `own` are those that their config trains."""
  c = weights.config.copy_and_resolve_references()
  with c.unlocked():
    if weights.frozen <= weights.leaves.keys():
      c.trained = (".*",)  # the file has all arrays
    if weights.role == "teacher" and weights is not own:
      c.network, c.policy, c.teacher, c.method = weights.network, None, None, flow_matching.config()
      c.lora, c.trained = None, (".*",)
      c.evaluation.checks, c.sampling.nfe = (), _TEACHER_CALLS
      if not weights.spec.cond:
        c.method.label_dropout = 0.0
  return c.lock()
