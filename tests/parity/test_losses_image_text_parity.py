"""CLIP's and SigLIP's losses, plain and tiled, against the models of Transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from ssljax import losses

pytestmark = pytest.mark.parity
TINY = {
  "hidden_size": 8,
  "intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
}
TEXT = TINY | {"vocab_size": 20, "max_position_embeddings": 7, "pad_token_id": 1}
TEXT |= {"bos_token_id": 18, "eos_token_id": 19}
IMAGE = TINY | {"image_size": 8, "patch_size": 4}


def embedded(model):
  """The loss of a model on six pairs and its embeddings; its numbers hold their gradients."""
  torch.manual_seed(0)
  ids = torch.randint(2, 18, (6, 7))
  ids[:, -1] = 19
  out = model(input_ids=ids, pixel_values=torch.randn(6, 3, 8, 8), return_loss=True)
  out.loss.backward()
  arrays = (out.image_embeds, out.text_embeds)
  return out.loss.item(), [jnp.asarray(x.detach().numpy()) for x in arrays]


@pytest.mark.parametrize("loss", [losses.clip_loss, losses.clip_tiled])
def test_clip(loss):
  from transformers import CLIPConfig, CLIPModel

  config = CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=5)
  model = CLIPModel(config).train(False)
  want, arrays = embedded(model)
  log_scale = jnp.float32(model.logit_scale.item())
  got, slope = jax.value_and_grad(lambda x: loss(*arrays, jnp.exp(x)).mean())(log_scale)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(slope, model.logit_scale.grad.item(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.siglip_loss, losses.siglip_tiled])
def test_siglip(loss):
  from transformers import SiglipConfig, SiglipModel

  text, image = TEXT | {"projection_size": 8}, IMAGE
  model = SiglipModel(SiglipConfig(text_config=text, vision_config=image)).train(False)
  # It starts with scale 1 and bias 0, the paper with 10 and -10.
  with torch.no_grad():
    model.logit_scale.fill_(np.log(10))
    model.logit_bias.fill_(-10.0)
  want, arrays = embedded(model)
  numbers = jnp.float32(np.log(10)), jnp.float32(-10)

  def mean(t, b):
    return loss(*arrays, jnp.exp(t), b).mean()

  got, slopes = jax.value_and_grad(mean, (0, 1))(*numbers)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  theirs = [model.logit_scale.grad.item(), model.logit_bias.grad.item()]
  np.testing.assert_allclose(slopes, theirs, rtol=1e-4)
