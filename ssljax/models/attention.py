"""Attention as a function, by the platform that it is compiled for, and rotary positions."""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
  """softmax(q kᵀ / sqrt(e) + bias) v, the softmax in float32: [b n h e] thrice, [1 h n n] -> q's.

  By the platform that the program is compiled for:
  GPU: cuDNN's fused kernel where it can, which never writes the weights [b h n n] to memory.
  TPU: the plain form. At the lengths of images (50 to 1,024 tokens) a head's weights stay in the
  chip's vector memory or nearly so, and a fused kernel would have to pad both the tokens and the
  64 features of a head to tiles of 128.
  CPU: the plain form in another order of axes: for `dot_product_attention` XLA transposes the
  weights there and back, which takes 1.7 times as long, forward and backward, at 197 tokens.
  """
  platform = compiled_platform()
  if platform != "cpu":
    fused = platform in ("gpu", "cuda") and cudnn_can(q, bias)
    return jax.nn.dot_product_attention(
      q, k, v, bias=bias, implementation="cudnn" if fused else "xla"
    )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  logits = jnp.einsum("bhte,bhse->bhts", q, k, preferred_element_type=jnp.float32)
  logits *= q.shape[-1] ** -0.5
  weights = jax.nn.softmax(logits if bias is None else logits + bias)
  return jnp.swapaxes(jnp.einsum("bhts,bhse->bhte", weights.astype(v.dtype), v), 1, 2)


def of_first(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
  """The weights of the first token alone, which a fused `attend` never writes, in float32:
  [b n h e] twice, [1 h n n] -> [b h n]."""
  logits = jnp.einsum("bhe,bshe->bhs", q[:, 0], k, preferred_element_type=jnp.float32)
  logits *= q.shape[-1] ** -0.5
  return jax.nn.softmax(logits if bias is None else logits + bias[:, :, 0])


def compiled_platform() -> str:
  """The platform of the mesh that is set, which may be another machine's, else this machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def cudnn_can(q: jax.Array, bias: jax.Array | None) -> bool:
  """Whether cuDNN's fused attention takes these shapes, forward and backward, on the GPU here.

  Half precision; heads of at most 128 features, a multiple of 8; with a bias an even number of
  tokens (its gradient); compute capability 8.0, that is A100 or later.
  """
  if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] > 128 or q.shape[-1] % 8:
    return False
  if bias is not None and q.shape[1] % 2:
    return False
  capability = getattr(jax.devices()[0], "compute_capability", "")  # "gfx90a" on AMD
  return capability.replace(".", "").isdigit() and float(capability) >= 8.0


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns pairs of features (i, i + e/2), in float32: [b n h e], cosines and sines [b|1 n 1 e/2].

  Source: RoFormer, Su et al. 2021, 2104.09864, in the half-split layout.
  """
  cos, sin = rotary
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
