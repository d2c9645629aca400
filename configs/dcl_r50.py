"""DCL on ImageNet-1k (Yeh et al. 2022, arXiv 2110.06848), ResNet-50, lightly's: 100 epochs.

Command:   python -m ssljax.main --config=configs/dcl_r50.py --workdir=runs/dcl_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 65.1, k-NN 49.6 top-1; DCLW 64.5 and 48.5 (lightly's documentation).
Notes:     `configs/dcl_r50.py:dclw` is the weighted loss. SimCLR's recipe with the rate
           .075·sqrt(batch) = 1.2 at batch 256.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 256
VARIANTS = {"dcl": None, "dclw": 0.5}


def get_config(arg: str = "dcl") -> ml_collections.ConfigDict:
  if arg not in VARIANTS:
    raise ValueError(f"variant {arg!r} is none of {', '.join(VARIANTS)}")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.decoupled_nce", temperature=0.1, sigma=VARIANTS[arg]),
    projector=(2048, 128), projector_last="batch", norm_views="together",
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
    name="ssljax.schedules.warmup_cosine", base=1.2, per=0, warmup_steps=10 * STEPS_PER_EPOCH
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
