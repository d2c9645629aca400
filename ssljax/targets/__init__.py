"""What is predicted: pure functions from an example, or a teacher's view of it."""

from ssljax.targets import features as _features
from ssljax.targets import frequencies as _frequencies
from ssljax.targets import hog as _hog
from ssljax.targets import pixels as _pixels
from ssljax.targets.features import *  # noqa: F403
from ssljax.targets.frequencies import *  # noqa: F403
from ssljax.targets.hog import *  # noqa: F403
from ssljax.targets.pixels import *  # noqa: F403

__all__ = sorted(
  name for family in (_features, _frequencies, _hog, _pixels) for name in family.__all__
)
