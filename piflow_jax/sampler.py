"""One sampler for every few-step model: it knows flow maps only (method.md, 7)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import flow
from piflow_jax.policy import rollout


def step_plan(clock, h=0.0):
  """Noise levels and noise-keeping factors of a sampling run (method.md, 7; pi-Flow's flow-map scheduler).

  Args:
    clock: flow.Clock; its nfe is the number of calls.
    h: stochasticity, 0 (deterministic) to inf (full re-noising after each step).
  Returns:
    dict of [nfe] arrays: `tau` and `t` at the start of each step, `tau_dst` and `t_dst` to which the map integrates,
    `t_next` where the step ends, `m` in [0, 1], the share of the state's noise that is kept (1: deterministic).
  Raises:
    ValueError: h is below 0 or NaN.
  """
  if not h >= 0:
    raise ValueError(f"h: {h} is not at least 0")
  tau = np.array(clock.step_times())
  t = clock.warp(tau)
  t, t_next = t[:-1], t[1:]
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = t_next * (1 - t) / (t * (1 - t_next))
  if h == 0:
    m = np.ones(clock.nfe)
  elif np.isinf(h):
    m = np.zeros(clock.nfe)
  else:
    m = ratio ** (h * h)
  t_dst = t_next * m / (1 - t_next + t_next * m)
  return dict(tau=tau[:-1], tau_dst=clock.unwarp(t_dst), t=t, t_dst=t_dst, t_next=t_next, m=m)


def renoise(x_dst, noise, t_next, m):
  """From t_dst up to t_next with fresh noise: (1 - t' + t' m) x_dst + t' sqrt(1 - m^2) noise (method.md, 7)."""
  return (1 - t_next + t_next * m) * x_dst + t_next * (1 - m * m) ** 0.5 * noise


def sample(flow_map, noise, keys, clock, *, h=0.0):
  """Draw x_0 from noise in clock.nfe calls of a flow map (method.md, 7).

  Args:
    flow_map: (x [B, ...], tau_src [B], tau_dst [B] raw times) -> x at tau_dst. One of the factories below.
    noise: [B, ...] standard normal, the state at tau = 1.
    keys: [B] random keys, one a sample: step i draws from fold_in(key, i), so that a sample does not depend on its
      neighbours in the batch. Only h > 0 draws; with h = 0 they may be None.
    clock: flow.Clock.
    h: stochasticity, 0 (deterministic) to inf (full re-noising after each step).
  Returns:
    x_0, [B, ...].
  Raises:
    ValueError: h is below 0 or NaN.
  """
  plan = {name: jnp.asarray(value, noise.dtype) for name, value in step_plan(clock, h).items()}
  if h > 0:
    chex.assert_shape(keys, noise.shape[:1])

  def step(x, inputs):
    s, i = inputs
    tau_src, tau_dst = (jnp.full(x.shape[0], s[name], x.dtype) for name in ("tau", "tau_dst"))
    y = flow_map(x, tau_src, tau_dst)
    chex.assert_equal_shape([y, x])
    y = y.astype(x.dtype)
    return (renoise(y, draw(i, x), s["t_next"], s["m"]) if h > 0 else y), None

  def draw(i, x):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)

  return jax.lax.scan(step, noise, (plan, jnp.arange(clock.nfe)))[0]


def batches(size, *arrays):
  """Arrays [n, ...] cut into parts of `size` rows, the last filled up from the first rows: one shape, compiled once.

  Returns:
    list of tuples, a part of each array.
  """
  n = len(arrays[0])
  filled = [np.resize(x, (n + -n % size, *x.shape[1:])) for x in arrays]
  return [tuple(x[i:i + size] for x in filled) for i in range(0, n, size)]


def mean_flow_map(network, clock):
  """The flow map of a MeanFlow network: x_dst = x + (t_dst - t) u(x, t, t_dst) (method.md, 9; arXiv 2505.13447).

  Args:
    network: (x [B, ...], t [B], t_dst [B] noise levels) -> mean velocity from t to t_dst.
    clock: flow.Clock, of which the shift counts.
  """
  def flow_map(x, tau_src, tau_dst):
    t, t_dst = clock.warp(tau_src), clock.warp(tau_dst)
    u = network(x, t, t_dst)
    chex.assert_equal_shape([u, x])
    return x + flow.broadcast_to(t_dst - t, x) * u

  return flow_map


def velocity_flow_map(velocity, clock, method="euler"):
  """The flow map of one Runge-Kutta step along a velocity; a many-step teacher is this, sampled at a large nfe.

  Args:
    velocity: (x [B, ...], t [B] noise level) -> u.
    clock: flow.Clock, of which the shift counts.
    method: "euler" (one network call a step), "midpoint" or "heun" (two), or the class name of an explicit Runge-Kutta
      solver of diffrax, with a call for each of its stages: "Ralston" two, "Bosh3" four, "Dopri5" and "Tsit5" seven, in
      these three the last one for an error estimate only.
  Raises:
    ValueError: another method, or diffrax is not installed.
  """
  own = method in ("euler", "midpoint", "heun")
  mean_velocity = functools.partial(flow.mean_velocity, method=method) if own else _diffrax_mean_velocity(method)
  return mean_flow_map(functools.partial(mean_velocity, velocity), clock)


def _diffrax_mean_velocity(method):
  """`flow.mean_velocity` by one step of the diffrax solver of that name."""
  unknown = f'method: {method!r} is none of "euler", "midpoint", "heun"'
  try:
    import diffrax
  except ImportError as e:
    raise ValueError(f"{unknown}, and solvers of diffrax need it installed: pip install -e '.[eval]'") from e
  solver = getattr(diffrax, method, None) if isinstance(method, str) else None
  if not (isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK) and hasattr(solver, "tableau")):
    raise ValueError(f'{unknown}, and no explicit Runge-Kutta solver of diffrax, like "Tsit5"')
  solver = solver()

  def mean_velocity(velocity, x, t_src, t_dst):
    # One time s in [0, 1] for all samples, so that each stage is one call on the whole batch. The state is the mean
    # velocity so far (dy/ds = u), not x: the same step, without a division by t_dst - t_src.
    length = t_dst - t_src

    def rate(s, y, _):
      return velocity(x + flow.broadcast_to(length, x) * y, t_src + s * length)

    term = diffrax.ODETerm(rate)
    s, y = jnp.array([0, 1], t_src.dtype), jnp.zeros_like(x)
    state = solver.init(term, s[0], s[1], y, None)
    return solver.step(term, s[0], s[1], y, None, state, made_jump=False)[0]

  return mean_velocity


def policy_flow_map(student, clock):
  """The flow map of a few-step student: a network call makes a policy, which integrates itself (method.md, 5).

  Args:
    student: (x [B, ...], t [B] noise level) -> policy.
    clock: flow.Clock, of which shift and total_substeps count.
  """
  def flow_map(x, tau_src, tau_dst):
    return rollout.rollout(student(x, clock.warp(tau_src)), x, tau_src, tau_dst, clock)

  return flow_map
