"""SimCLR on ImageNet-1k (Chen et al. 2020, arXiv 2002.05709), ResNet-50, 1000 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/simclr_r50.py --workdir=runs/simclr_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code. The paper used 32 to 128 TPU v3 cores.
Expected:  linear probe 69.3 top-1 (paper); the released command of 100 epochs gives about 64.5.
Notes:     weight decay 1e-4 is the released code's and both its commands'; the paper says 1e-6. The
           released loss is the sum of both directions (loss_scale 2), its pictures are not
           normalised, and its LARS has the learning rate inside the momentum.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 4096


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.nt_xent", temperature=0.1),
    loss_scale=2.0, projector=(2048, 128), projector_last="scale", norm_views="together",
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
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1e-4, rate_inside=True)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.3, per=256, warmup_steps=10 * STEPS_PER_EPOCH
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
