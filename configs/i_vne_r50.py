"""I-VNE+ on ImageNet-100 (Kim et al. 2023, arXiv 2304.01434), ResNet-50, 800 epochs, batch 64.

Command:   python -m ssljax.main --config=configs/i_vne_r50.py --workdir=runs/i_vne_r50 \
             --config.data.source=folder:/data/imagenet100
Hardware:  not run to the end with this code.
Expected:  the authors' numbers are with four small views more, which this method does not make.
Notes:     the views are pulled together (alpha 4.16 = log of the batch, times 1 - cos) and the
           entropy of their spectrum is raised (alpha 1), as in the authors' code without its small
           views (extra_views 0).
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 126_689 // 64


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 64
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.alignment"), loss_scale=4.16 / 2,
    projector=(2048, 2048, 256), projector_last="batch", projector_bias="all",
    norm_views="together",
    terms=dict(entropy=dict(name="ssljax.losses.von_neumann_entropy", weight=-1.0)),
  )  # fmt: skip
  config.data = dict(
    source="folder:imagenet100",
    split="train[:95%]",
    eval_train="train[:95%]",
    eval_test="train[95%:]",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224),
      scale=(0.14, 1.0), jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(1.0, 0.1), solarize=(0.0, 0.2),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4, decay_vectors=False)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine",
    base=0.4,
    per=256,
    warmup_steps=10 * STEPS_PER_EPOCH,
    warmup_start=1e-6,
  )
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
