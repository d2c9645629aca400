"""SSL-EY on ImageNet-1k (Chapman et al. 2023, arXiv 2310.01012), ResNet-50, 100 epochs, batch 2048.

Command:   python -m ssljax.main --config=configs/ssl_ey_r50.py --workdir=runs/ssl_ey_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  none is published: the table in the authors' README is VICReg's.
Notes:     VICReg's pipeline, projector and optimizer, as in the authors' code.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 2048


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100 * STEPS_PER_EPOCH
  config.batch_size = 2048
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.ssl_ey"),
    projector=(8192, 8192, 8192), projector_bias="hidden",
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
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1e-6)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.2, per=256, warmup_steps=10 * STEPS_PER_EPOCH,
    end=0.2 * 2048 / 256 / 1000,
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=20 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=10 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
