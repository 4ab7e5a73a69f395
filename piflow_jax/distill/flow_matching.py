"""Flow matching (Lipman et al., arXiv 2210.02747): how a teacher is trained in the first place."""

import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.distill import segments


def objective(network, drop_condition, *, shift=1.0, logit_mean=None, logit_std=1.0):
  """Regress u = noise - x_0 at a random point of the path.

  Args:
    network: (params, x [B, ...], t [B] noise level, cond) -> u.
    drop_condition: (cond, uniform [B]) -> cond, null for some: what guidance needs.
    shift: of `flow.warp`, applied to the drawn raw time.
    logit_mean, logit_std: of the logit-normal raw time; uniform where the mean is None.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); batch is {x_0 [B, ...], cond}.
  """
  def loss_fn(params, batch, keys):
    x_0 = batch["x_0"]
    key_tau, key_noise, key_drop = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    if logit_mean is None:
      tau = flow.uniform_tau(segments.draw_uniform(key_tau))
    else:
      tau = flow.logit_normal_tau(segments.draw_noise(key_tau, (len(keys),)), mean=logit_mean, std=logit_std)
    t = flow.warp(tau, shift)
    noise = segments.draw_noise(key_noise, x_0.shape)
    cond = drop_condition(batch["cond"], segments.draw_uniform(key_drop))
    u = network(params, flow.noise_data(x_0, noise, t), t, cond)
    return jnp.mean((u - (noise - x_0)) ** 2)

  def objective(params, teacher_params, batch, keys, step):
    del teacher_params, step
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, keys)
    return grads, {"loss": loss}

  return objective
