"""What is predicted: pure functions from an example, or a teacher's view of it, to [b n t]."""

from ssljax.targets.features import average_layers as average_layers
from ssljax.targets.features import layer_normalise as layer_normalise
from ssljax.targets.pixels import normalised_pixels as normalised_pixels
from ssljax.targets.pixels import unnormalise as unnormalise
