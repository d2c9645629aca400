"""Effective rank and spread of features: signs of collapse that need no labels."""

import numpy as np

from ssljax.evals.features import Features, check_features


def rank(
  train: Features, test: Features, *, examples: int = 25600, epsilon: float = 1e-7
) -> dict[str, float]:
  """Effective rank and spread of the train features [n d] -> {"rank/effective": …, …}.

  "rank/effective" is RankMe (Garrido et al. 2023, 2210.02885): exp of the entropy of the singular
  values of [n d], not centred, between 1 and min(n, d). "rank/std" is the mean over features of
  their standard deviation; "rank/std_unit" the same of the features scaled to length 1, times
  sqrt(d): 0 when collapsed to a point, 1 when spread evenly (Chen & He 2021, 2011.10566);
  "rank/dead" the share of features that are constant. `examples` (the paper's 25,600), evenly
  spaced, are used at most.
  """
  check_features(train, test, "rank")
  size, width = train.pooled.shape
  if size < 2:
    raise ValueError(f"rank: needs at least 2 train examples, got {size}")
  rows = train.pooled
  if size > examples:
    rows = rows[np.linspace(0, size - 1, examples).astype(np.int64)]
  deviation = rows.std(0, dtype=np.float64)
  unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
  level = np.abs(rows).mean(0, dtype=np.float64)
  return {
    "rank/effective": effective_rank(rows, epsilon),
    "rank/std": float(deviation.mean()),
    "rank/std_unit": float(unit.std(0, dtype=np.float64).mean() * np.sqrt(width)),
    "rank/dead": float(np.mean(deviation <= 1e-6 * level)),
  }


def effective_rank(rows: np.ndarray, epsilon: float = 1e-7) -> float:
  """RankMe of a table [n d]: exp(-sum p log p), p = singular values / their sum + epsilon."""
  # The Gram matrix of the short side, in float64: as precise as float32 features are, and
  # quicker than an SVD of the table.
  gram = np.zeros((min(rows.shape),) * 2)
  if rows.shape[0] < rows.shape[1]:
    pieces = [rows[:, i : i + 4096].T for i in range(0, rows.shape[1], 4096)]
  else:
    pieces = [rows[i : i + 4096] for i in range(0, rows.shape[0], 4096)]
  for piece in pieces:
    piece = np.asarray(piece, np.float64)
    gram += piece.T @ piece
  values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
  if values.sum() == 0:
    return 1.0  # all features are zero: one point
  share = values / values.sum() + epsilon
  return float(np.exp(-np.sum(share * np.log(share))))
