"""One sampler for every few-step model: it only knows flow maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import errors
from piflow_jax import flow


def step_plan(*, nfe, shift=1.0, h=0.0, final_scale=1.0):
  """Noise levels and noise-keeping factors of a sampling run (pi-Flow's flow-map scheduler; spec section 6).

  Returns:
    dict of [nfe] arrays: `tau` and `t` at the start of each step, `tau_dst` and `t_dst` to which the map integrates,
    `t_next` where the step ends, `m` in [0, 1], the share of the state's noise that is kept (1: deterministic).
  """
  tau = np.array(flow.step_times(nfe=nfe, final_scale=final_scale))
  t = flow.warp(tau, shift)
  t, t_next = t[:-1], t[1:]
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = t_next * (1 - t) / (t * (1 - t_next))
  if h == 0:
    m = np.ones(nfe)
  elif np.isinf(h):
    m = np.zeros(nfe)
  else:
    m = ratio ** (h * h)
  t_dst = t_next * m / (1 - t_next + t_next * m)
  return dict(tau=tau[:-1], tau_dst=flow.unwarp(t_dst, shift), t=t, t_dst=t_dst, t_next=t_next, m=m)


def renoise(x_dst, noise, t_next, m):
  """From t_dst up to t_next with fresh noise: (1 - t' + t' m) x_dst + t' sqrt(1 - m^2) noise."""
  return (1 - t_next + t_next * m) * x_dst + t_next * (1 - m * m) ** 0.5 * noise


def sample(flow_map, noise, key, *, nfe, shift=1.0, h=0.0, final_scale=1.0):
  """Draw x_0 from noise in nfe calls of a flow map.

  Args:
    flow_map: (x [B, ...], tau_src [B], tau_dst [B], key) -> x at tau_dst. One of the factories below.
    noise: [B, ...] standard normal, the state at tau = 1.
    key: random key for h > 0 and for maps that draw.
    nfe: number of calls.
    shift: of `flow.warp`.
    h: stochasticity, 0 (deterministic) to inf (full re-noising after each step).
    final_scale: length of the last segment as a share of the others.
  Returns:
    x_0, [B, ...].
  """
  plan = step_plan(nfe=nfe, shift=shift, h=h, final_scale=final_scale)

  def step(x, inputs):
    s, key = inputs
    map_key, noise_key = jax.random.split(key)
    times = lambda tau: jnp.full(x.shape[0], tau, x.dtype)
    x = flow_map(x, times(s["tau"]), times(s["tau_dst"]), map_key).astype(x.dtype)
    if h > 0:
      x = renoise(x, jax.random.normal(noise_key, x.shape, x.dtype), s["t_next"], s["m"])
    return x, None

  plan = {k: jnp.asarray(v, noise.dtype) for k, v in plan.items()}
  return jax.lax.scan(step, noise, (plan, jax.random.split(key, nfe)))[0]


def batches(size, *arrays):
  """Arrays [n, ...] cut into parts of `size` rows, the last filled up from the first rows: one shape, compiled once.

  Returns:
    list of tuples, a part of each array.
  """
  n = len(arrays[0])
  filled = [np.resize(x, (n + -n % size, *x.shape[1:])) for x in arrays]
  return [tuple(x[i:i + size] for x in filled) for i in range(0, n, size)]


def mean_flow_map(network, *, shift=1.0):
  """The flow map of a MeanFlow network: x_dst = x + (t_dst - t) u(x, t, t_dst) (arXiv 2505.13447, Sampling).

  Args:
    network: (x [B, ...], t [B], t_dst [B] noise levels) -> mean velocity from t to t_dst.
  """
  def flow_map(x, tau_src, tau_dst, key):
    del key
    t, t_dst = flow.warp(tau_src, shift), flow.warp(tau_dst, shift)
    return x + flow.broadcast_to(t_dst - t, x) * network(x, t, t_dst)

  return flow_map


def velocity_flow_map(velocity, *, shift=1.0, method="euler"):
  """The flow map of one Runge-Kutta step along a velocity; a many-step teacher is this, sampled at a large nfe.

  Args:
    velocity: (x [B, ...], t [B] noise level) -> u.
    shift: of `flow.warp`.
    method: "euler" (one network call a step), "midpoint" or "heun" (two), or the class name of an explicit Runge-Kutta
      solver of diffrax, with a call for each of its stages: "Ralston" two, "Bosh3" four, "Dopri5" and "Tsit5" seven, in
      these three the last one for an error estimate only.
  Raises:
    errors.UserError: another method, or diffrax is not installed.
  """
  own = method in ("euler", "midpoint", "heun")
  mean_velocity = functools.partial(flow.mean_velocity, method=method) if own else _diffrax_mean_velocity(method)
  return mean_flow_map(functools.partial(mean_velocity, velocity), shift=shift)


def _diffrax_mean_velocity(method):
  """`flow.mean_velocity` by one step of the diffrax solver of that name."""
  unknown = f'config.sampling.solver: {method!r} is none of "euler", "midpoint", "heun"'
  try:
    import diffrax
  except ImportError as e:
    raise errors.UserError(f"{unknown}, and solvers of diffrax need it installed: pip install -e '.[eval]'") from e
  solver = getattr(diffrax, method, None)
  if not (isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK) and hasattr(solver, "tableau")):
    raise errors.UserError(f'{unknown}, and no explicit Runge-Kutta solver of diffrax, like "Tsit5"')
  solver = solver()

  def mean_velocity(velocity, x, t_src, t_dst):
    # One clock s in [0, 1] for all samples, so that each stage is one call on the whole batch. The state is the mean
    # velocity so far (dy/ds = u), not x: the same step, without a division by t_dst - t_src.
    length = t_dst - t_src
    term = diffrax.ODETerm(lambda s, y, _: velocity(x + flow.broadcast_to(length, x) * y, t_src + s * length))
    s, y = jnp.array([0, 1], t_src.dtype), jnp.zeros_like(x)
    state = solver.init(term, s[0], s[1], y, None)
    return solver.step(term, s[0], s[1], y, None, state, made_jump=False)[0]

  return mean_velocity


def policy_flow_map(student, rollout, *, shift=1.0):
  """The flow map of a few-step student: one network call makes a policy, which integrates itself to tau_dst.

  Args:
    student: (x [B, ...], t [B] noise level) -> policy.
    rollout: (policy, x, tau_src, tau_dst) -> x at tau_dst.
  """
  def flow_map(x, tau_src, tau_dst, key):
    del key
    return rollout(student(x, flow.warp(tau_src, shift)), x, tau_src, tau_dst)

  return flow_map
