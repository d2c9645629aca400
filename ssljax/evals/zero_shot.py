"""Classification without training: the class whose texts are nearest to the image."""

import numpy as np

from ssljax.evals.features import Features


def zero_shot(test: Features, prompts: np.ndarray) -> dict[str, float]:
  """Share of images whose class has the nearest text: features [n d], texts [c t d].

  A class is the mean of its t texts' unit vectors, made a unit vector again; the nearest has the
  largest cosine (Radford et al. 2021, 2103.00020). Labels count the classes.

  Raises:
    ValueError: labels are missing or name no class, or widths differ.
  """
  if test.label is None:
    raise ValueError("zero_shot needs labels, but the test split has none")
  count = len(prompts)
  label = np.asarray(test.label)
  if label.min() < 0 or label.max() >= count:
    raise ValueError(f"zero_shot: labels from {label.min()} to {label.max()}, but {count} classes")
  if test.pooled.shape[1] != prompts.shape[-1]:
    widths = f"{test.pooled.shape[1]} and {prompts.shape[-1]}"
    raise ValueError(f"zero_shot: features and texts differ in width ({widths})")
  classes = _unit(_unit(np.asarray(prompts, np.float64)).mean(1))
  cosine = _unit(np.asarray(test.pooled, np.float64)) @ classes.T
  own = cosine[np.arange(len(label)), label]
  # How many classes are nearer than the right one; of equal ones the first counts as nearer.
  before = (cosine == own[:, None]) & (np.arange(count) < label[:, None])
  rank = ((cosine > own[:, None]) | before).sum(1)
  found = {"zero_shot/top1": float((rank == 0).mean())}
  return found | ({"zero_shot/top5": float((rank < 5).mean())} if count > 5 else {})


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
