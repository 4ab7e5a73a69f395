"""piflow_jax: few-step flow models by policy-based distillation (pi-Flow), in JAX."""
