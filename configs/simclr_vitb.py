"""SimCLR with a ViT-B/16 on ImageNet-1k, 300 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/simclr_vitb.py --workdir=runs/simclr_vitb \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  no published number for exactly this. Loss and views are SimCLR's (Chen et al. 2020,
           arXiv 2002.05709), optimizer, schedule and projector those of MoCo v3's ViT (Chen, Xie
           and He 2021, arXiv 2104.02057). It stands for a coupled loss at scale.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 4096


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), scan=True, remat="dots"
  )
  config.method = dict(
    name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.nt_xent", temperature=0.2),
    projector=(4096, 4096, 256), projector_last="plain", norm_views="together",
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
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.1)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1.5e-4, per=256, warmup_steps=40 * STEPS_PER_EPOCH
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
