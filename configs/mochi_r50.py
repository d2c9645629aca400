"""MoCHi on ImageNet-1k (Kalantidis et al. 2020, arXiv 2010.01028), ResNet-50, 200 epochs.

Command:   python -m ssljax.main --config=configs/mochi_r50.py --workdir=runs/mochi_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 68.0 top-1 (paper: between 68.0 and 68.7, not looked up again).
Notes:     MoCo v2 with mixtures of each query's 1024 hardest negatives, from epoch 10 on.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50", zero_init=False)
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(
      name="ssljax.losses.mochi", temperature=0.2, n_hard=1024, s=1024, s2=128,
      start=10 * STEPS_PER_EPOCH,
    ),
    projector=(2048, 128), projector_norm="none", target="teacher", symmetric=False,
    momentum=0.999, queue=65536,
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224), scale=(0.2, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.5, 0.5), solarize=(0.0, 0.0),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4)
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=0.03, per=256)
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
