"""TensorFlow graph from a record to the finished view."""

from ssljax.data import images
from ssljax.data.sources import Source
from ssljax.data.tensorflow import load
from ssljax.data.views import View

# TensorFlow's default is the fast transform, up to 9 grey levels off; this one is Pillow's, to the
# bit.
DCT = "INTEGER_ACCURATE"


def decode(loaded, source: Source, channels: int, views: View, drawn):
  """Graph from a record to the finished view; upright JPEGs are cropped while decoding."""
  tf = load()
  if source.form == "array":
    image = loaded["record"]
    return views.apply(image, drawn) if views.apply else image
  record, shape = loaded["record"], loaded["shape"]
  if source.form == "npy":
    image = tf.io.decode_raw(record, tf.as_dtype(source.dtype))
    image = tf.reshape(image, [shape[1], shape[2], shape[4]])
    image = tf.broadcast_to(image, [shape[1], shape[2], channels])
    image = tf.ensure_shape(image, [None, None, channels])
    return views.apply(image, drawn) if views.apply else image

  def whole():
    return upright(decode_whole(record, shape[0], channels), shape[3])

  if views.window is None or views.finish is None:
    image = tf.ensure_shape(whole(), [None, None, channels])
    return views.apply(image, drawn) if views.apply else image
  turned = shape[3] >= 5
  height = tf.where(turned, shape[2], shape[1])
  width = tf.where(turned, shape[1], shape[2])
  window = tf.stack(views.window(height, width, drawn))
  part = tf.cond(
    (shape[0] == images.JPEG) & (shape[3] == 1),
    lambda: tf.io.decode_and_crop_jpeg(record, window, channels=channels, dct_method=DCT),
    lambda: tf.slice(
      whole(), tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [channels]], 0)
    ),
  )
  return views.finish(tf.ensure_shape(part, [None, None, channels]), drawn)


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
