"""SimMIM pre-training on ImageNet-1k (Xie et al. 2021, arXiv 2111.09886), ViT-B/16, 800 epochs.

Command:   python -m ssljax.main --config=configs/simmim_vitb.py --workdir=runs/simmim_vitb \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  this recipe has not been run to the end with this code.
Expected:  fine-tuned top-1 83.8 (paper, ViT-B, 800 epochs).
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 2048


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 2048
  config.dtype = "bfloat16"
  # No absolute positions but one table of relative ones for all blocks, no bias on the keys.
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), positions="relative", pool="mean",
    drop_path=0.1, layer_scale=0.1, qkv_bias="qv", init_kernels="beit", depth_scale=True,
    scan=True,
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.masked", layout="replace", head="linear", target="pixels", loss="l1"
  )
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.67, 1.0), method="bilinear"
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.masking.units", unit=2, ratio=0.6),  # units of 32 pixels
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.05, clip=5.0,
    no_decay=("cls_token",),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_multistep", base=1e-4, per=512,
    warmup_steps=10 * STEPS_PER_EPOCH, warmup_start=5e-7 * 2048 / 512,
    milestones=(700 * STEPS_PER_EPOCH,), factor=0.1,
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=200 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=40 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
