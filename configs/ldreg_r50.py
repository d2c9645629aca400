"""SimCLR with LDReg on ImageNet-1k (Huang et al. 2024, arXiv 2401.10474), ResNet-50, 100 epochs.

Command:   python -m ssljax.main --config=configs/ldreg_r50.py --workdir=runs/ldreg_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 64.8 top-1 (paper, not looked up again), SimCLR alone 64.3.
Notes:     the authors' configuration of batch 2048: alpha .01, 64 neighbours, on the encoder's
           features. Any config takes such terms: method.terms.
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
    name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.nt_xent", temperature=0.1),
    projector=(2048, 128), norm_views="together",
    terms=dict(
      ldreg=dict(name="ssljax.losses.ldreg", alpha=0.01, neighbours=64, on="pooled"),
    ),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224), scale=(0.08, 1.0),
      jitter=(0.8, 0.8, 0.8, 0.2),
      blur=(0.5, 0.5), solarize=(0.0, 0.0),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1e-6)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine",
    base=0.075 * 2048**0.5,
    per=0,
    warmup_steps=10 * STEPS_PER_EPOCH,
  )
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=20 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=10 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
