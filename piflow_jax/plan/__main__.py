"""What a config's step would take up and cost on a TPU slice or on GPUs: compiled for them, with none attached.

  python -m piflow_jax.plan --config=configs/imagenet_dit.py:XL,repa-1nfe --config.mesh.fsdp=16 --topology=v5e-16
  python -m piflow_jax.plan --config=configs/imagenet_dit.py:XL,repa-1nfe --topology=v5p:4x4x4,v6e-256 --json=plan.json
  python -m piflow_jax.plan --config=configs/flux.py:gm-4nfe --config.microbatches=8 --topology=h100-8

A slice is a generation (v5e, v5p, v6e) and its shape, or its size; --slices=2 joins two of them. Several slices
make one table; of several sizes of x_0 (config.data.sizes) each is a column. XLA's compiler for TPUs reports the
memory; FLOPs are counted in the traced step; the time of a step is the largest of: FLOPs at the chip's peak, the
compiler's own estimate of its cycles (it has none for Pallas kernels, so the table counts their calls), bytes sent over
the links. That time is the best to hope for, not a measurement. Of GPUs (h100, h200, a100; 1, 2, 4 or 8 in a host) no
cycles are known, and memory is without the workspace of cuDNN's kernels.
Needs libtpu or JAX's plugin for CUDA (make plan brings what it needs), some minutes and 3 to 7 GB.
Exit status: 0 everything fits; 1 something does not; 2 bad input.
"""

import json
import pathlib
import sys
import time

from absl import flags
import jax

from piflow_jax import errors
from piflow_jax import program
from piflow_jax.plan import compiled

_GIB = 2**30


def _define(values):
  flags.DEFINE_list("topology", None, "Slices, e.g. v5e-16,v5p:4x4x4.", flag_values=values)
  flags.DEFINE_integer("slices", 1, "So many of them, joined by the data-centre network; set config.mesh.slices alike.",
                       lower_bound=1, upper_bound=1024, flag_values=values)
  flags.DEFINE_bool("sampler", False,
                    "Plan a call of the sampler, of config.evaluation.batch_size, not the training step.",
                    flag_values=values)
  flags.DEFINE_string("json", None, "Also write the figures to this file.", flag_values=values)


def _main(given):
  values = given.flags
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs compiled for other devices
  if not values.topology or len(set(values.topology)) < len(values.topology):
    raise errors.UserError(
        f"--topology: {','.join(values.topology)!r} is empty, or says one twice; name each slice once")
  if values.json:
    program.check_file(values, "json")
  for topology in values.topology:
    compiled.devices_of(topology, values.slices)  # refuse a bad one before minutes go into the others
  plans = []
  for topology in values.topology:
    began = time.monotonic()
    print(f"{topology}: compiling, a minute or two", file=sys.stderr, flush=True)
    for size in (given.config.data or {}).get("sizes") or (None,):
      plans.append(compiled.plan(given.config, topology, slices=values.slices, sampler=values.sampler, size=size))
    print(f"{topology}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
  print(table(plans))
  if values.json:
    try:
      pathlib.Path(values.json).write_text(json.dumps(plans, indent=1) + "\n")
    except OSError as e:
      raise errors.UserError(f"--json: cannot write {values.json!r} ({e})") from e
  return 0 if all(p["fits"] for p in plans) else 1


def table(plans):
  """Plans side by side, as text."""
  rows = [("", [p["topology"] for p in plans]),
          ("chips", [str(p["chips"]) for p in plans]),
          ("x_0", [" x ".join(map(str, p["x_0"])) if len({p["x_0"] for p in plans}) > 1 else "" for p in plans]),
          ("mesh", [" x ".join(f"{axis} {n}" for axis, n in p["mesh"].items() if n > 1) or "1" for p in plans]),
          ("samples a step", [f"{p['samples']:,}" for p in plans])]
  for kind in dict.fromkeys(kind for p in plans for kind in p["memory"]):
    unit = "GiB a device, of HBM" if kind == "limit" else "GiB a device"
    rows.append((f"{kind}, {unit}", [f"{p['memory'][kind] / _GIB:.2f}" if kind in p["memory"] else "" for p in plans]))
  rows.append(("fits", [_fits(p) for p in plans]))
  rows.append(("model PFLOP a step", [f"{p['model_flops'] / 1e15:.3g}" for p in plans]))
  rows.append(("with recomputation", [f"{p['flops'] / 1e15:.3g}" for p in plans]))
  for kind in dict.fromkeys(kind for p in plans for kind in p.get("collectives", ())):
    at = [p.get("collectives", {}).get(kind) for p in plans]
    rows.append((f"{kind}, GB sent a device", [f"{c['bytes'] / 1e9:.3g} in {c['count']}" if c else "" for c in at]))
  for kind, what in (("peak", "at peak FLOPs"), ("compiler", "by the compiler's cycles"), ("links", "over the links"),
                     ("network", "between slices"), ("step", "a step, at best")):
    at = [p.get("seconds", {}).get(kind) for p in plans]
    rows.append((f"seconds {what}", ["" if seconds is None else f"{seconds:.3g}" for seconds in at]))
  rows.append(("Pallas calls, not in the cycles", [f"{p['kernels']:,}" if p.get("kernels") else "" for p in plans]))
  rows.append(("MFU at that", [f"{p['mfu']:.0%}" if "mfu" in p else "" for p in plans]))
  rows.append(("padded arrays (> 2 times)", [_padded(p) for p in plans]))
  rows.append(("hours of the recipe", [f"{p['hours']:.3g}" if "hours" in p else "" for p in plans]))
  rows.append(("chip-hours", [f"{p['chip_hours']:{'.2g' if p['chip_hours'] < 10 else ',.0f'}}" if "hours" in p else ""
                              for p in plans]))
  widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(plans))]
  left = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{left}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths))
                   for name, cells in rows if any(cells))


def _fits(plan):
  spare = plan["memory"]["limit"] - plan["memory"]["total"]
  return f"yes, {spare / _GIB:.2f} GiB left" if plan["fits"] else f"NO, by {-spare / _GIB:.2f} GiB"


def _padded(plan):
  if "padded" not in plan:
    return ""
  worst = plan["padded"][0] if plan["padded"] else None
  return f"{len(plan['padded'])}, to {worst['padded'] / _GIB:.2f} GiB" if worst else "none"


PROGRAM = program.Program(_main, _define, __doc__, needs=("topology",), config="file")

if __name__ == "__main__":
  program.run(PROGRAM)
