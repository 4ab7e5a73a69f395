"""Students of FLUX.1-dev, 12 billion parameters, in four calls or eight.

  python -m piflow_jax.convert from-torch --source=FLUX.1-dev/transformer --config=configs/flux.py:teacher --workdir=T
  python -m piflow_jax.data.prompts --prompts=FILE --encoder=flux:FLUX.1-dev --out=CACHE
  python -m piflow_jax.main --config=configs/flux.py:gm-4nfe-free --workdir=DIR --config.data.path=CACHE \\
      --config.teacher.checkpoint=T

The argument is RECIPE or RECIPE,HEIGHTxWIDTH in pixels (1024x1024), or several sizes with commas between, each batch
of one of them; recipes are in configs/text_to_image.py. Those that do not end in "free" want latents in the cache
(--size, --autoencoder of piflow_jax.data.prompts). None has been run to its end at this size;
docs/text_to_image.md has plans, memory and hours on TPU slices and on eight H100s, and the time of a step on one card.
"""

from configs import text_to_image
from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.data import texts
from piflow_jax.models import flux

TARGETS = ("double_blocks/(image|text)/(mlp_in|mlp_out)", "single_blocks/(mlp_in|out)", "time_(in|out)")


def get_config(argument="gm-4nfe"):
  """The config of a recipe, or of the teacher that weights are converted for."""
  name, shapes = text_to_image.parsed(argument, "configs/flux.py")
  c = text_to_image.base(name)
  # T5's 512 tokens with their padding, which FLUX.1 attends to, and CLIP's pooled vector.
  c.data = texts.config(shape=shapes[0], sizes=shapes[1:] and shapes, tokens=512, width=4096, pooled=768, padded=True,
                        encoder="flux:FLUX.1-dev")
  c.network = flux.config(half_times=True)
  if name == "teacher":
    c.flow = flow.dynamic_config()
    return c.lock()
  c.teacher = teacher.config(checkpoint="runs/flux/teacher")  # its guidance is embedded: one pass
  c.steps = 3000
  text_to_image.student(c, name, targets=TARGETS, num_states=4, num_decay_steps=2000)
  return c.lock()
