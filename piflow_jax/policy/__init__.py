"""What a policy and its head are (method.md, 3 to 5). Nothing inherits from these: JAX sees pytrees and functions."""

from typing import Any, Protocol, runtime_checkable


class Policy(Protocol):
  """A pytree that says, without a network, where every point goes; x is [B, ..., C], t [B] a noise level."""

  def velocity(self, x, t):
    """u [B, ..., C] at x, t."""


@runtime_checkable
class Integral(Protocol):
  """A policy that knows its integral: `rollout.rollout` makes no substeps."""

  def advance(self, x, tau_src, tau_dst):
    """x at tau_dst, from x at tau_src; raw times [B]."""


@runtime_checkable
class ByPosition(Protocol):
  """A policy that is integrated in a layout of its own."""

  def by_position(self, integrate, x, n, *times):
    """integrate(policy, x, n, *times, n_max=) with all arguments in the policy's layout.

    `integrate` may rely on n and times broadcasting to x, and on n_max [] being the largest n; it may be called on some
    positions at a time.

    Args:
      integrate: `rollout.euler` with the rest of its arguments bound.
      x: [B, ..., C].
      n: [B] substeps, floats.
      *times: [B] each.
    Returns:
      [B, ..., C].
    """


class Head(Protocol):
  """A Flax module at the end of a network whose output becomes a policy.

  Its parameters belong to the student; all that it knows of the latent comes from the layout. Heads may offer more:
  `sharpen(policy, last [B] bool)` lowers the temperature of the policies of all sampling calls but the last;
  `fuse(params, tau_src, tau_dst, clock)` gives `layers.VelocityHead`'s parameters for the mean velocity between two raw
  times; `export_config(clock)` is the policy as pi-Flow's release names it, and a head without it cannot be exported.
  """

  dtype: Any

  def __call__(self, tokens, embedding, layout):
    """Tokens [B, N, D], embedding [B, D] and `network.Layout` -> output, a pytree."""

  def to_policy(self, out, x_src, t_src, clock, *, eps):
    """The policy of an output at x_src [B, ..., C], t_src [B]; eps is the least noise level that it divides by."""

  def perturb(self, policy, keys):
    """The behaviour policy, which makes the training trajectory; each sample draws from its own key [B]."""

  def from_teacher(self, teacher_head, fresh, key):
    """Parameters that start as the teacher's output layer, {"out": {kernel, bias}}, shaped as the fresh ones."""
