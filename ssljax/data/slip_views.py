"""The pictures that SLIP sees of one example (Mu et al. 2021, 2112.12750)."""

from collections.abc import Sequence

from ssljax.data.views import Views, crop_flip, two_views


def slip_views(
  *,
  size: Sequence[int] = (224, 224),
  image_scale: Sequence[float] = (0.5, 1.0),
  image_flip: bool = False,
  scale: Sequence[float] = (0.08, 1.0),
  jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
  blur: Sequence[float] = (0.5, 0.5),
) -> Views:
  """The leaf `image` [b size c], a crop of `image_scale` of the area for the text, and the leaf
  `views` [b 2 size c]: `two_views` with `scale`, `jitter` and `blur`."""
  image = crop_flip(size=size, scale=image_scale, flip=image_flip)
  pair = two_views(size=size, scale=scale, jitter=jitter, blur=blur)
  return Views({"image": image, **pair.leaves})
