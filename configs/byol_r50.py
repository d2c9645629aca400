"""BYOL on ImageNet-1k (Grill et al. 2020, arXiv 2006.07733), ResNet-50, 1000 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/byol_r50.py --workdir=runs/byol_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 74.4 top-1 (1000 epochs, the authors' README).
Notes:     the sum of both directions (loss_scale 2); LARS outside the momentum, norms and biases
           neither decay nor adapt. 300 epochs: base=.3, weight_decay=1e-6, momentum start .99; 100
           epochs: base=.45. The flip is the last operation here, which changes nothing.
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
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.normalized_l2"), loss_scale=2.0,
    projector=(4096, 256), projector_bias="hidden", predictor=(4096, 256), predictor_bias="hidden",
    target="teacher", momentum=dict(schedule="cosine", start=0.996, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224),
      scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(1.0, 0.1), solarize=(0.0, 0.2),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1.5e-6, trust=1e-3)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.2, per=256, warmup_steps=10 * STEPS_PER_EPOCH
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
