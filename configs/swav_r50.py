"""SwAV on ImageNet-1k (Caron et al. 2020, arXiv 2006.09882), ResNet-50, 800 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/swav_r50.py --workdir=runs/swav_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 75.3 top-1 (README of the original; 72.1 / 73.9 / 74.6 after 100 / 200 / 400
           epochs). `:small` is its run of 200 epochs with batch 256 and a queue: 72.7.
Notes:     batch norm and Sinkhorn are over the global batch. The original's LARC divides by
           ‖g‖ + decay·‖p‖, which is the same to 1e-6 here.
"""

import ml_collections

from ssljax.config import complete


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  if arg not in ("", "small"):
    raise ValueError(f"variant {arg!r} is none of small")
  small = arg == "small"
  epochs, batch_size = (200, 256) if small else (800, 4096)
  epoch = 1_281_167 // batch_size
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = epochs * epoch
  config.batch_size = batch_size
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(
    name="ssljax.methods.swav", projector=(2048, 128), prototypes=3000, prototypes_unit="start",
    queue=3840 if small else 0, queue_from=15 * epoch if small else 0,
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
    freeze=("prototypes",), freeze_steps=5005 if small else 313, unit=("prototypes",),
  )  # fmt: skip
  warm = dict(warmup_steps=10 * epoch, warmup_start=0.3)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.6 if small else 4.8, per=0,
    end=0.0006 if small else 0.0048, **({} if small else warm),
  )  # fmt: skip
  config.checkpoint = dict(every=epoch, keep=2, keep_every=100 * epoch)
  config.eval = dict(
    every=25 * epoch,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
