"""Barlow Twins on ImageNet-1k (Zbontar et al. 2021, arXiv 2103.03230), ResNet-50, 1000 epochs.

Command:   python -m ssljax.main --config=configs/barlow_twins_r50.py --workdir=runs/barlow \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 73.2 top-1 (paper), 73.5 (released weights).
Notes:     biases and norms have a rate of their own, .0048 for .2 (vector_rate); the rate ends at a
           thousandth of its peak.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 2048


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 2048
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.barlow_twins", redundancy_weight=0.0051),
    projector=(8192, 8192, 8192), projector_bias="none",
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224), scale=(0.08, 1.0),
      jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(1.0, 0.1), solarize=(0.0, 0.2),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1e-6, vector_rate=0.024)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.2, per=256, warmup_steps=10 * STEPS_PER_EPOCH,
    end=0.2 * 2048 / 256 / 1000,
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
