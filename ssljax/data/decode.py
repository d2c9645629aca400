"""TensorFlow graph from a record to the finished view."""

from ssljax.data import images
from ssljax.data.sources import Source
from ssljax.data.tensorflow import load
from ssljax.data.views import Views

# TensorFlow's default is the fast transform, up to 9 grey levels off; this one is Pillow's, to the
# bit.
DCT = "INTEGER_ACCURATE"


def decode(loaded, source: Source, channels: int, views: Views, drawn) -> dict:
  """Graph from a record to the finished leaves; of upright JPEGs only the part that the views use
  is decoded, once for all of them."""
  tf = load()
  each = list(zip(views.each(), drawn))

  def applied(image):
    return views.grouped([v.apply(image, d) if v.apply else image for v, d in each])

  if source.form == "array":
    return applied(loaded["record"])
  record, shape = loaded["record"], loaded["shape"]
  if source.form == "npy":
    image = tf.io.decode_raw(record, tf.as_dtype(source.dtype))
    image = tf.reshape(image, [shape[1], shape[2], shape[4]])
    image = tf.broadcast_to(image, [shape[1], shape[2], channels])
    return applied(tf.ensure_shape(image, [None, None, channels]))

  def whole():
    return upright(decode_whole(record, shape[0], channels), shape[3])

  if any(view.window is None for view, _ in each):
    return applied(tf.ensure_shape(whole(), [None, None, channels]))
  windows = tf.unstack(loaded["windows"])
  box = around(windows)
  part = tf.cond(
    (shape[0] == images.JPEG) & (shape[3] == 1),
    lambda: tf.io.decode_and_crop_jpeg(record, box, channels=channels, dct_method=DCT),
    lambda: cut(whole(), box),
  )
  part = tf.ensure_shape(part, [None, None, channels])
  if len(each) == 1:
    return views.grouped([view.finish(part, d) for view, d in each])
  corner = tf.concat([box[:2], [0, 0]], 0)
  return views.grouped([v.finish(cut(part, w - corner), d) for (v, d), w in zip(each, windows)])


def windows(shape, drawn, views: Views):
  """Graph: the windows of all views, int32 [v 4], of an example of this header."""
  tf = load()
  height, width = sides(shape)
  found = [view.window(height, width, d) for view, d in zip(views.each(), drawn)]
  return tf.stack([tf.stack(window) for window in found])


def sides(shape):
  """Height and width of what a header [… 5] describes, upright."""
  tf = load()
  turned, height, width = shape[..., 3] >= 5, shape[..., 1], shape[..., 2]
  return tf.where(turned, width, height), tf.where(turned, height, width)


def boxes(windows, drawn, shape):
  """Graph: where the views of a batch lie, float32 [b v 4], from their windows int32 [b v 4] in
  pictures of these headers [b 5]; see `Views`."""
  tf = load()
  mirrored = tf.stack([one["flip"] for one in drawn], 1)
  top, first, height, width = tf.unstack(windows, axis=-1)
  left, right = tf.where(mirrored, first + width, first), tf.where(mirrored, first, first + width)
  edges = tf.stack([top, left, top + height, right], -1)
  longer = tf.maximum(*sides(shape))[:, None, None]
  return tf.cast(edges, tf.float32) / tf.cast(longer, tf.float32)


def around(windows):
  """The smallest window that holds all the windows (y, x, height, width)."""
  tf = load()
  if len(windows) == 1:
    return windows[0]
  corner = tf.reduce_min([w[:2] for w in windows], 0)
  return tf.concat([corner, tf.reduce_max([w[:2] + w[2:] for w in windows], 0) - corner], 0)


def cut(image, window):
  """The window (y, x, height, width) of [h w c]."""
  tf = load()
  part = tf.slice(image, tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [-1]], 0))
  return tf.ensure_shape(part, [None, None, image.shape[-1]])


def decode_whole(record, kind, channels: int):
  """JPEG, PNG, BMP or WebP -> uint8 [h w c]: grey is replicated, alpha dropped."""
  tf = load()
  readers = [
    lambda: tf.io.decode_jpeg(record, channels=channels, dct_method=DCT),
    lambda: tf.io.decode_png(record, channels=channels),
    lambda: tf.io.decode_bmp(record, channels=channels),
  ]
  if hasattr(tf.io, "decode_webp") and channels == 3:
    readers.append(lambda: tf.io.decode_webp(record, channels=3)[0])
  return tf.switch_case(kind, readers)


def upright(image, turn):
  """Apply the EXIF orientation 1..8 to [h w c]."""
  tf = load()
  image = tf.cond(turn >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
  mirror = tf.reduce_any(tf.equal(turn, [2, 3, 6, 7]))
  image = tf.cond(mirror, lambda: tf.reverse(image, [1]), lambda: image)
  flip = tf.reduce_any(tf.equal(turn, [3, 4, 7, 8]))
  return tf.cond(flip, lambda: tf.reverse(image, [0]), lambda: image)
