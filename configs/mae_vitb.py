"""MAE pre-training on ImageNet-1k (He et al. 2021, arXiv 2111.06377), ViT-B/16, 1600 epochs.

Command:   python -m ssljax.main --config=configs/mae_vitb.py --workdir=runs/mae_vitb \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Variants:  configs/mae_vitb.py:vitl16 and configs/mae_vitb.py:vith14
Hardware:  the paper used TPU v3-128: 42 hours for ViT-L over 1600 epochs. This recipe has not been
           run to the end with this code.
Expected:  fine-tuned top-1 83.6 (B), 85.9 (L), 86.9 (H/14); linear probe 68.0, 75.8, 76.6 (paper).
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 4096  # 312: the original drops the last, partial batch
VARIANTS = {"vitb16": ("B", 16), "vitl16": ("L", 16), "vith14": ("H", 14)}


def get_config(arg: str = "vitb16") -> ml_collections.ConfigDict:
  if arg not in VARIANTS:
    raise ValueError(f"variant {arg!r} is none of {', '.join(VARIANTS)}")
  variant, patch = VARIANTS[arg]
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1600 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.vit", variant=variant, patch=(patch, patch), scan=True)
  config.method = dict(
    name="ssljax.methods.masked", layout="drop", head="decoder", target="normalised_pixels",
    loss="l2", decoder_width=512, decoder_depth=8, decoder_heads=16,
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.2, 1.0)),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.masking.random", ratio=0.75),
  )
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.05)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1.5e-4, per=256, warmup_steps=40 * STEPS_PER_EPOCH
  )
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=200 * STEPS_PER_EPOCH)
  config.mesh = dict(state="replicated" if variant == "B" else "full")
  config.eval = dict(
    every=40 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
