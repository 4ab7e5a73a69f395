"""Adapters as files, in the four namings that people share them in, and merged into a tree (docs/text_to_image.md).

  release    X.lora_A.weight, X.lora_B.weight, X a module of diffusers' network; scale 1 (pi-Flow's students)
  diffusers  transformer.X.lora_A.weight ...; r and alpha in the header's lora_adapter_metadata, else scale 1
  peft       base_model.model.X.lora_A.weight ... in adapter_model.safetensors; r and alpha in adapter_config.json
  kohya      lora_unet_NAME.lora_down.weight, .lora_up.weight, .alpha; NAME is Black Forest Labs' module for FLUX.1,
             diffusers' own for other networks

W' = W + scale B A with A (r, in), B (out, r); scale is alpha / r, of rsLoRA alpha / sqrt(r).
"""

import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

from piflow_jax import errors
from piflow_jax import lora
from piflow_jax import params as params_lib
from piflow_jax.convert import files
from piflow_jax.convert import naming as naming_lib
from piflow_jax.convert import table

NAMINGS = ("release", "diffusers", "peft", "kohya")
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.")
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_A.default.weight": "a", "lora_B.default.weight": "b",
          "lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
_METADATA = "lora_adapter_metadata"
_KOHYA = "lora_unet_"
# Black Forest Labs' modules of FLUX.1 -> diffusers'. Several share A, and have their parts of B's rows in this order.
_BFL = {
    r"double_blocks_(\d+)_img_attn_qkv": [f"transformer_blocks.{{}}.attn.to_{c}" for c in "qkv"],
    r"double_blocks_(\d+)_txt_attn_qkv": [f"transformer_blocks.{{}}.attn.add_{c}_proj" for c in "qkv"],
    r"double_blocks_(\d+)_img_attn_proj": ["transformer_blocks.{}.attn.to_out.0"],
    r"double_blocks_(\d+)_txt_attn_proj": ["transformer_blocks.{}.attn.to_add_out"],
    r"double_blocks_(\d+)_img_mlp_0": ["transformer_blocks.{}.ff.net.0.proj"],
    r"double_blocks_(\d+)_img_mlp_2": ["transformer_blocks.{}.ff.net.2"],
    r"double_blocks_(\d+)_txt_mlp_0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    r"double_blocks_(\d+)_txt_mlp_2": ["transformer_blocks.{}.ff_context.net.2"],
    r"double_blocks_(\d+)_img_mod_lin": ["transformer_blocks.{}.norm1.linear"],
    r"double_blocks_(\d+)_txt_mod_lin": ["transformer_blocks.{}.norm1_context.linear"],
    r"single_blocks_(\d+)_linear1": [
        *(f"single_transformer_blocks.{{}}.attn.to_{c}" for c in "qkv"), "single_transformer_blocks.{}.proj_mlp"],
    r"single_blocks_(\d+)_linear2": ["single_transformer_blocks.{}.proj_out"],
    r"single_blocks_(\d+)_modulation_lin": ["single_transformer_blocks.{}.norm.linear"],
    r"img_in": ["x_embedder"], r"txt_in": ["context_embedder"],
    r"(time|guidance|vector)_in_(in|out)_layer": ["time_text_embed.{}.linear_{}"],
    r"final_layer_adaLN_modulation_1": ["norm_out.linear"],
}
_EMBEDDERS = {"time": "timestep_embedder", "guidance": "guidance_embedder", "vector": "text_embedder", "in": "1",
              "out": "2"}
_SWAPPED = "norm_out.linear"  # there shift, scale; in diffusers scale, shift


class Adapter(NamedTuple):
  """What is added to one linear layer."""

  a: np.ndarray  # (r, in)
  b: np.ndarray  # (out, r)
  scale: float

  @property
  def delta(self):
    """scale B A, (out, in) float32."""
    return np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))

  @property
  def folded(self):
    """The same with scale 1."""
    return Adapter(self.a, (self.b * np.float32(self.scale)).astype(self.b.dtype), 1.0)

  @property
  def swapped(self):
    """B's two halves of rows in the other order."""
    return self._replace(b=np.concatenate(np.split(self.b, 2)[::-1]))


class Loaded(NamedTuple):
  """A file of adapters."""

  adapters: dict  # {diffusers' module: Adapter}
  others: dict  # {key: array} of tensors that are no adapters': a student's last norm and head
  metadata: dict  # of the file's header
  config: dict  # config.json beside it


def read(path, flag="--source"):
  """Loaded, of a safetensors file or a folder with one, in any of the namings.

  Args:
    path: of it.
    flag: that named it, for messages.
  Raises:
    errors.UserError: it cannot be read, or half of an adapter is missing or of another rank.
  """
  try:
    return _read(pathlib.Path(path), flag)
  except errors.UserError as e:
    raise errors.UserError(str(e).replace("--source:", f"{flag}:", 1)) from e


def _read(path, flag):
  beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
  peft = files.read_json(beside) if beside.exists() else {}
  with files.open_source(path) as source:
    metadata, parts, others = source.metadata, {}, {}
    for key in source.shapes:
      module, part = _split(key)
      if part is None:
        others[_bare(key)] = source.read(key)
      elif not key.startswith("lora_te"):  # CLIP's, which this program does not run
        parts.setdefault(module, {})[part] = source.read(key)
    about, config, where = _settings(metadata, peft, flag), source.config, f"{flag}: {source.where}"
  found = {}
  for module, part in parts.items():
    if not {"a", "b"} <= part.keys() or part["a"].ndim != 2 or part["b"].ndim != 2 or (
        part["a"].shape[0] != part["b"].shape[1]):
      shapes = {k: v.shape for k, v in part.items()}
      raise errors.UserError(f"{where}: the adapter of {module} is {shapes}; A (r, in) and B (out, r) make one")
    if bad := [name for name, x in part.items() if not np.isfinite(x.astype(np.float32)).all()]:
      raise errors.UserError(f"{where}: the adapter of {module} holds NaN or infinity, in its {bad[0]}")
    alpha = float(part["alpha"]) if "alpha" in part else about["alpha"](module)
    scale = lora.scale_of(part["a"].shape[0], alpha, about["rslora"])
    found |= _for_diffusers(module, Adapter(part["a"], part["b"], scale), where)
  if not found:
    raise errors.UserError(f"{where} holds no adapters (keys like {', '.join(list(source.shapes)[:3])})")
  return Loaded(found, others, metadata, config)


def _split(key):
  """(module, "a", "b" or "alpha") of a key; part None of one that is no adapter's."""
  for end, part in _PARTS.items():
    if key.endswith(f".{end}"):
      return _bare(key[:-len(end) - 1]), part
  return key, None


def _bare(name):
  for prefix in _PREFIXES:
    name = name.removeprefix(prefix)
  return name


def _settings(metadata, peft, flag):
  """How a file says r and alpha: {"alpha": module -> alpha or None, "rslora": bool}."""
  known = dict(peft)
  if _METADATA in metadata:
    try:
      known = {k.removeprefix("transformer."): v for k, v in files.parse(metadata[_METADATA]).items()}
    except (ValueError, AttributeError) as e:
      raise errors.UserError(f"{flag}: {_METADATA} in the header is no table ({e}); take it away") from e
  patterns = known.get("alpha_pattern") or {}

  def alpha(module):
    for pattern, value in patterns.items():
      if re.search(rf"(^|\.)({pattern})$", module):
        return float(value)
    return float(known["lora_alpha"]) if known.get("lora_alpha") is not None else None

  return {"alpha": alpha, "rslora": bool(known.get("use_rslora"))}


def _for_diffusers(module, adapter, where):
  """{diffusers' module: Adapter} of one under whatever name."""
  if not module.startswith(_KOHYA):
    return {module: adapter}
  name = module.removeprefix(_KOHYA)
  for pattern, modules in _BFL.items():
    if match := re.fullmatch(pattern, name):
      names = [m.format(*(_EMBEDDERS.get(g, g) for g in match.groups())) for m in modules]
      return _parts_of(names, adapter, where)
  return {_underscored(name): adapter}


def _underscored(name):
  """A module of diffusers whose dots were written as underscores."""
  words = ("transformer_blocks", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "to_q", "to_k", "to_v", "to_out",
           "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "img_in", "txt_in", "proj_out", "norm_out",
           "time_text_embed", "timestep_embedder", "linear_1", "linear_2")
  for i, word in enumerate(words):
    name = re.sub(rf"(?<![a-z0-9]){word}(?![a-z0-9])", f"<{i}>", name)
  return re.sub(r"<(\d+)>", lambda match: words[int(match.group(1))], name.replace("_", "."))


def _parts_of(names, adapter, where):
  rows = len(adapter.b)
  if len(names) == 1:
    return {names[0]: adapter.swapped if names[0] == _SWAPPED else adapter}
  width = adapter.a.shape[1]  # q, k and v are as wide as what they read
  ends = [width * (i + 1) for i in range(3)]
  if (len(names) == 3 and rows != 3 * width) or (len(names) == 4 and rows <= 3 * width):
    raise errors.UserError(f"{where}: the adapter of {names[0]} and others has {rows} rows, which are not "
                           f"those of three layers of {width}")
  return {name: adapter._replace(b=b) for name, b in zip(names, np.split(adapter.b, ends[:len(names) - 1]))}


def write(folder, loaded, naming):
  """Write adapters in one of NAMINGS; what is no adapter's is written by "release" alone.

  Args:
    folder: that is made; it must not be there yet, or be empty.
    loaded: Loaded.
    naming: of NAMINGS.
  Raises:
    errors.UserError: it cannot be written, or the naming cannot say these.
  """
  files.check_free(folder)
  tensors, metadata, more, name = _NAMED[naming](loaded)
  files.write_adapters(folder, name, tensors, metadata | {"format": "pt"}, more)


def _release(loaded):
  metadata = {k: v for k, v in loaded.metadata.items() if k == "policy_config"}
  tensors = _tensors({module: adapter.folded for module, adapter in loaded.adapters.items()})
  return tensors | loaded.others, metadata, {"config.json": loaded.config}, f"{files.NAME}.safetensors"


def _tensors(adapters, prefix=""):
  return {f"{prefix}{module}.{part}.weight": np.ascontiguousarray(x) for module, adapter in adapters.items()
          for part, x in (("lora_A", adapter.a), ("lora_B", adapter.b))}


def _peft_settings(loaded, prefix=""):
  """What PEFT says of adapters: r and alpha, those that differ by module, and the modules."""
  ranks = {m: len(ad.a) for m, ad in loaded.adapters.items()}
  alphas = {m: ad.scale * len(ad.a) for m, ad in loaded.adapters.items()}
  rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
  found = dict(
      peft_type="LORA", task_type=None, base_model_name_or_path=None, bias="none", r=rank, lora_alpha=alpha,
      use_rslora=False, lora_dropout=0.0, rank_pattern={m: r for m, r in ranks.items() if r != rank},
      alpha_pattern={m: x for m, x in alphas.items() if x != alpha}, target_modules=list(loaded.adapters))
  return {f"{prefix}{k}": v for k, v in found.items()}


def _diffusers(loaded):
  metadata = {_METADATA: json.dumps(_peft_settings(loaded, "transformer."), sort_keys=True)}
  return _tensors(loaded.adapters, "transformer."), metadata, {}, "pytorch_lora_weights.safetensors"


def _peft(loaded):
  return (_tensors(loaded.adapters, "base_model.model."), {}, {"adapter_config.json": _peft_settings(loaded)},
          "adapter_model.safetensors")


def _kohya(loaded):
  found, left = {}, dict(loaded.adapters)
  while left:
    name, modules = _for_kohya(next(iter(left)))
    found |= _kohya_tensors(name, _joined(modules, {module: left.pop(module) for module in modules if module in left}))
  return found, {}, {}, "adapters.safetensors"


def _for_kohya(module):
  """(name, modules that are one layer under it, in its order) of a module of diffusers'."""
  for pattern, modules in _BFL.items():
    for known in modules:
      match = re.fullmatch(re.escape(known).replace(r"\{\}", "([a-z_0-9]+)"), module)
      name = match and _bfl_name(pattern, match.groups())
      if name:
        return f"{_KOHYA}{name}", [m.format(*match.groups()) for m in modules]
  return f"{_KOHYA}{module.replace('.', '_')}", [module]


def _bfl_name(pattern, groups):
  """Black Forest Labs' name of a module, or None: the embedder is of none of theirs."""
  back = {v: k for k, v in _EMBEDDERS.items()} if "guidance" in pattern else {}
  words = iter([back.get(g, g) for g in groups])
  name = re.sub(r"\([^)]*\)", lambda _: next(words), pattern)
  return name if re.fullmatch(pattern, name) else None


def _joined(names, adapters):
  """One Adapter of several modules that read the same input: their A above one another, their B side by side."""
  if len(names) == 1:
    return adapters[names[0]].swapped if names[0] == _SWAPPED else adapters[names[0]]
  there = {name: adapter.folded for name, adapter in adapters.items()}
  some = next(iter(there.values()))
  width = some.a.shape[1]
  rows = [len(there[n].b) if n in there else (width if i < 3 else 4 * width) for i, n in enumerate(names)]
  b = np.zeros((sum(rows), sum(len(adapter.a) for adapter in there.values())), some.b.dtype)
  column = 0
  for i, name in enumerate(names):
    if name in there:
      rank = len(there[name].a)
      b[sum(rows[:i]):sum(rows[:i + 1]), column:column + rank] = there[name].b
      column += rank
  return Adapter(np.concatenate([there[name].a for name in names if name in there]), b, 1.0)


def _kohya_tensors(name, adapter):
  return {f"{name}.lora_down.weight": np.ascontiguousarray(adapter.a),
          f"{name}.lora_up.weight": np.ascontiguousarray(adapter.b),
          f"{name}.alpha": np.array(adapter.scale * len(adapter.a), np.float32)}


_NAMED = {"release": _release, "diffusers": _diffusers, "peft": _peft, "kohya": _kohya}


class Placed(NamedTuple):
  """What an adapter adds to a kernel, or to its part of one layer; computed when it is asked for."""

  adapter: Adapter
  strength: float
  entry: table.Entry

  @property
  def delta(self):
    """float32, shaped as the kernel, or its layer, is here."""
    return np.float32(self.strength) * self.entry.transform.here(self.adapter.delta, self.entry.shape)


def deltas(loaded, weights, strength, where):
  """{(path of a kernel, layer or None): [Placed]} of a file for one network.

  Args:
    loaded: Loaded.
    weights: `naming.Weights` of the network.
    strength: factor of the whole file.
    where: the file, for messages.
  Raises:
    errors.UserError: a module that the network has not, or one of another shape.
  """
  namings = naming_lib.of_network(weights.network.make)
  if not namings:
    raise errors.UserError(f"--lora: {where}: nothing is known of the names of {weights.field}")
  rows = next(iter(namings.values())).rows(weights)
  entries = table.entries(rows, {p: s for p, s in weights.shapes.items() if p.endswith("/kernel")}, "")
  by_key = {key: entry for entry in entries for key in entry.keys}
  found, skipped = {}, []
  for module, adapter in loaded.adapters.items():
    entry = by_key.get(f"{module}.weight")
    if entry is None:
      raise errors.UserError(f"--lora: {where} has an adapter of {module}, which this network has not")
    if entry.path.startswith(("head/", "adaln_out/")) and weights.role == "student":
      skipped.append(module)  # trained whole: the student's stand in the place of what the file was made for
      continue
    shape = len(adapter.b), adapter.a.shape[1]
    if shape != entry.shape_there:
      raise errors.UserError(f"--lora: {where}: the adapter of {module} makes {shape}, the network has "
                             f"{entry.shape_there}")
    found[entry.path, entry.layer] = [Placed(adapter, strength, entry)]
  if skipped:
    print(f"{where}: left out, as the student has its own: {', '.join(sorted(skipped))}", flush=True)
  return found


def merged(tree, found):
  """A nested dict of arrays with deltas added to its kernels; a path that it has not is passed over.

  A layer's sum is rounded once. In memory are the deltas of one layer: those of all make up a network in float32.

  Args:
    tree: of jax.Arrays.
    found: as of `deltas`, of one file or several.
  """
  leaves = params_lib.named_leaves(tree)
  for (path, layer), placed in found.items():
    if (leaf := leaves.get(path)) is None:
      continue
    part = leaf if layer is None else leaf[layer]
    part = (part.astype(np.float32) + sum(one.delta for one in placed)).astype(leaf.dtype)
    leaves[path] = part if layer is None else leaf.at[layer].set(part)
  return params_lib.nested(leaves)
