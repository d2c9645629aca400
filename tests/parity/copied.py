"""What the comparisons share: random weights in a torch model, and arrays out of it."""

import numpy as np
import torch


def randomise(model, seed=0):
  """Every parameter and table random, of deviation 0.15 around its scale: freshly made models have
  zero position tables, tokens and biases, which would hide half of the mistakes."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      scale = "norm" in name and name.endswith("weight")
      noise = rng.normal(0, 0.15, tuple(tensor.shape))
      tensor.copy_(torch.tensor(noise + scale, dtype=tensor.dtype))
  return model.eval()


def arrays(model):
  """The state dict as NumPy arrays."""
  return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def images(shape, seed=1):
  """[b h w c] for us and [b c h w] for torch."""
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return x, torch.tensor(x.transpose(0, 3, 1, 2))


def close(got, want, relative=1e-5):
  """Largest difference over the largest value, as a number that the test prints when it fails."""
  got = np.asarray(got, np.float64)
  want = want.detach().numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
  assert got.shape == want.shape, (got.shape, want.shape)
  error = np.abs(got - want).max() / np.abs(want).max()
  print(f"relative difference {error:.2e}")
  assert error <= relative, f"relative difference {error:.2e}"
