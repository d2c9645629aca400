"""Losses as pure functions of arrays. They import jax and nothing else of this package."""

from ssljax.losses.masked import masked_l1 as masked_l1
from ssljax.losses.masked import masked_l2 as masked_l2
from ssljax.losses.masked import masked_smooth_l1 as masked_smooth_l1
