"""SigLIP with a ViT-B/16 (Zhai et al. 2023, arXiv 2303.15343) on pairs of your own, batch 4096.

Command:   python -m ssljax.main --config=configs/siglip_vitb.py --workdir=runs/siglip_vitb \
             --config.data.source=tar:/data/pairs/*.tar
Data:      shards of pairs, KEY.jpg and KEY.txt (or KEY.json with a caption).
Hardware:  not run to the end with this code.
Expected:  no published number for exactly this: WebLI, the pairs of the paper, is not public.
Notes:     scale 10 and bias -10 at the start, neither decays; texts see all of themselves and are
           pooled at their last place; images are resized, not cropped.
"""

import ml_collections

from ssljax.config import complete


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100_000
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), positions="learned", class_token=False,
    pool="attention", activation="gelu_tanh", scan=True, remat="dots",
  )  # fmt: skip
  text = dict(
    name="ssljax.models.text", width=768, depth=12, heads=12, causal=False, pool="last", eps=1e-6,
    activation="gelu_tanh", init_kernels="xavier", scan=True, remat="dots",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.image_text", text_encoder=text, loss="siglip", project="text", scale=10.0,
    bias=-10.0,
  )  # fmt: skip
  config.data = dict(
    source="tar:/data/pairs/*.tar",
    split="train",
    eval_train="",
    eval_test="",
    views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=224),
    text=dict(name="ssljax.data.text.captions", length=64, vocabulary=32768),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0,
    limits=(("log_scale", 0.0, 4.6052),),
  )  # fmt: skip
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=5000)
  config.checkpoint = dict(every=1000, keep=2)
  return complete(config)
