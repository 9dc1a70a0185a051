"""Architectures: what a checkpoint contains (`*_config.py`, no jax) and what it computes (flax.nnx)."""
