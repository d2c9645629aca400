"""TiCo on ImageNet-1k (Zhu et al. 2022, arXiv 2206.10698), ResNet-50, lightly's: 100 epochs.

Command:   python -m ssljax.main --config=configs/tico_r50.py --workdir=runs/tico_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  none. lightly's benchmark has 49.7 (linear probe), 26.6 (k-NN), but gives its loss the
           teacher's side first, so that the covariance term has no gradient there.
Notes:     lightly's optimizer, views and head: BYOL's views, one direction, no predictor.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.tico"), projector=(4096, 256), target="teacher",
    symmetric=False, momentum=dict(schedule="cosine", start=0.99, end=1.0),
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
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=20 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=10 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
