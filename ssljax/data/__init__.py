"""Input on the host: sources, order, views, hidden places, batches. Never imports jax."""
