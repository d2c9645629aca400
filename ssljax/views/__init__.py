"""The view operations of `ssljax.data.views` as JAX functions inside the step.

Every recipe has the name and the arguments of the host's, and draws from the same distributions;
with the same parameters `apply` gives the same pixels, but not rounded to integers.
"""

from ssljax.views.recipes import View, Views, crop_flip, keep, multi_crop, two_views

__all__ = ["View", "Views", "crop_flip", "keep", "multi_crop", "two_views"]
