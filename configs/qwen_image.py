"""Students of Qwen-Image, 20 billion parameters, in four calls or eight.

  python -m piflow_jax.convert from-torch --source=Qwen-Image/transformer --config=configs/qwen_image.py:teacher \\
      --workdir=T
  python -m piflow_jax.data.prompts --prompts=FILE --encoder=qwen:Qwen-Image --out=CACHE
  python -m piflow_jax.main --config=configs/qwen_image.py:gm-4nfe-free --workdir=DIR --config.data.path=CACHE \\
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
from piflow_jax.models import qwen_image

TARGETS = ("blocks/(image|text)/(mlp_in|mlp_out)", "time_(in|out)")


def get_config(argument="gm-4nfe"):
  """The config of a recipe, or of the teacher that weights are converted for."""
  name, shapes = text_to_image.parsed(argument, "configs/qwen_image.py")
  c = text_to_image.base(name)
  c.data = texts.config(shape=shapes[0], sizes=shapes[1:] and shapes, tokens=512, width=3584, pooled=0,
                        encoder="qwen:Qwen-Image")
  c.network = qwen_image.config(half_times=True)
  if name == "teacher":
    c.flow = flow.dynamic_config(max_tokens=8192, max_log_shift=0.9)
    return c.lock()
  # The unconditional pass has the cache's negative prompt, the authors' was empty.
  c.teacher = teacher.config(checkpoint="runs/qwen_image/teacher", guidance_scale=4.0)
  c.steps = 9000
  text_to_image.student(c, name, targets=TARGETS, num_states=2, num_decay_steps=0)
  return c.lock()
