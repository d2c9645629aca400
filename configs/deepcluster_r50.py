"""DeepCluster-v2 on ImageNet-1k (Caron et al. 2020, arXiv 2006.09882), ResNet-50, 800 epochs, batch
4096.

Command:   python -m ssljax.main --config=configs/deepcluster_r50.py --workdir=runs/deepcluster \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 75.2 top-1 (README of the original).
Notes:     the first epoch fills the bank, nothing moves but batch norm's statistics: the original
           does so in a pass before the first. Clusterings are 312 steps apart, 0.3 % of the images
           less than an epoch; those keep the rows of the time before. The bank takes 1.3 GB; with
           --config.mesh.state=full every device holds a part.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 4096


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 801 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.deepcluster", examples=1_281_167, projector=(2048, 128),
    clusters=(3000, 3000, 3000),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.multi_crop", size=(224, 224), scale=(0.14, 1.0), local_views=6,
      local_size=(96, 96), local_scale=(0.05, 0.14), jitter=(0.8, 0.8, 0.8, 0.2),
      blur=(0.5, 0.5, 0.5), solarize=(0.0, 0.0, 0.0),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.lars", weight_decay=1e-6, trust=1e-3, adapt_vectors=True,
    freeze=("encoder", "projector"), freeze_steps=STEPS_PER_EPOCH,
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=4.8, per=0, warmup_steps=11 * STEPS_PER_EPOCH,
    warmup_start=0.3, end=0.0048,
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
