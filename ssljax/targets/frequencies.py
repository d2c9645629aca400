"""Fourier spectra as targets: the same function for the prediction and the truth."""

import jax
import jax.numpy as jnp

__all__ = ("amplitudes", "spectrum")


def spectrum(x: jax.Array) -> jax.Array:
  """Orthonormal 2-D Fourier transform: [… h w c] -> [… h w c 2], real and imaginary parts.

  Formula: F_uv = Σ_hw x_hw·exp(-2πi(uh/H + vw/W)) / √(HW).
  Source: A²MIM, Li et al. 2022, 2205.13943.
  Tested: NumPy; torch fft2; Parseval.

  The mean square of the spectrum, summed over its two parts, is that of the pixels. Frequency 0 is
  at the corner.

  >>> targets.spectrum(jnp.ones((2, 4, 4, 3)))[0, 0, 0, 0].tolist()
  [4.0, 0.0]
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  f = jnp.fft.fft2(x, axes=(-3, -2), norm="ortho")
  return jnp.stack([f.real, f.imag], -1)


def amplitudes(x: jax.Array) -> jax.Array:
  """Amplitude of each frequency: [… h w c] -> [… h w c].

  Formula: |F_uv| of the orthonormal 2-D Fourier transform.
  Source: masked autoencoders for microscopy, Kraus et al. 2024, 2404.10242.
  Tested: NumPy; torch fft2.

  A shift around the image leaves it as it is. The original adds 0.01 times the L1 distance of the
  amplitudes of reconstruction and truth to the squared error. The slope at amplitude 0 is 0.

  >>> targets.amplitudes(jnp.ones((2, 4, 4, 3)))[0, 0, 0].tolist()
  [4.0, 4.0, 4.0]
  """
  square = jnp.square(spectrum(x)).sum(-1)
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
