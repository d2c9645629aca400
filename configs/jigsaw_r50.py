"""Jigsaw on ImageNet-1k (Noroozi and Favaro 2016, arXiv 1603.09246), ResNet-50, 105 epochs, batch
256: the recipe of VISSL (Goyal et al. 2019, arXiv 1905.01235) with 100 orders.

Command:   python -m ssljax.main --config=configs/jigsaw_r50.py --workdir=runs/jigsaw_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 48.57 top-1 (46.73 with 2,000 orders, 48.11 with 10,000).
Notes:     a step sees 2,304 tiles of 64 pixels. The orders are chosen by the same rule, but are not
           the released ones. There an image is resized to 256 and cut to 255 at random; here it is
           an inception crop of at least half its area. Biases do not decay here, there they do;
           norms do in neither. The schedule moves once an epoch there, every step here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 105 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(name="ssljax.methods.pretext.jigsaw", permutations=100, standardise=False)
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.crop_flip", size=(255, 255), scale=(0.5, 1.0), ratio=(1.0, 1.0),
      gray=0.66,
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4, decay_vectors=False)
  config.schedule = dict(
    name="ssljax.schedules.warmup_multistep", base=0.1, per=256, warmup_start=0.025,
    warmup_steps=5 * STEPS_PER_EPOCH,
    milestones=tuple(epoch * STEPS_PER_EPOCH for epoch in (30, 60, 90, 100)),
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=105 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=15 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
