"""data2vec on ImageNet-1k (Baevski et al. 2022, arXiv 2202.03555), ViT-B/16, 800 epochs.

Command:   python -m ssljax.main --config=configs/data2vec_vitb.py --workdir=runs/data2vec_vitb \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  this recipe has not been run to the end with this code.
Expected:  fine-tuned top-1 84.2 (paper, ViT-B).
Deviates from the published command in three places: the block mask has exactly 120 places (there
119.5 on average), colours are changed after the crop, and attention weights have no dropout (there
0.05).
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
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), positions="relative", pool="mean",
    drop_path=0.25, layer_scale=1e-4, qkv_bias="qv", init_kernels="beit", depth_scale=True,
    scan=True,
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.masked", layout="replace", head="linear", target="teacher",
    loss="smooth_l1", loss_beta=2.0, teacher_momentum=0.9998, teacher_layers=6,
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.crop_flip",
      size=(224, 224),
      scale=(0.08, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.0),
    ),  # fmt: skip
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.masking.block", count=120),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.05, clip=3.0,
    no_decay=("cls_token", "positions"),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=2e-3, per=0, warmup_steps=10 * STEPS_PER_EPOCH,
    end=1e-5,
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
