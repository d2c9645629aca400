"""SimSiam on ImageNet-1k (Chen and He 2020, arXiv 2011.10566), ResNet-50, 100 epochs, batch 512.

Command:   python -m ssljax.main --config=configs/simsiam_r50.py --workdir=runs/simsiam_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 68.1 top-1 (100 epochs, batch 512; 68.3 at batch 256).
Notes:     the predictor's rate stays at its first value (optimizer.groups); decay is on everything,
           norms and biases, too. The schedule moves once an epoch there, every step here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 512


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100 * STEPS_PER_EPOCH
  config.batch_size = 512
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.negative_cosine"),
    projector=(2048, 2048, 2048), projector_last="plain", projector_bias="none",
    predictor=(512, 2048), target="stopped",
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224),
      scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.5, 0.5), solarize=(0.0, 0.0),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.sgd", weight_decay=1e-4, groups=dict(predictor=dict(hold=0))
  )
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=0.05, per=256)
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
