"""VICRegL on ImageNet-1k (Bardes, Ponce and LeCun 2022, arXiv 2210.01571), ConvNeXt-S, 400 epochs.

Command:   python -m ssljax.main --config=configs/vicregl_convnexts.py --workdir=runs/vicregl \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Variants:  configs/vicregl_convnexts.py:0.9, the weight of whole views; 0.75 unless said.
           ConvNeXt-B: --config.encoder.variant=base.
Hardware:  not run to the end with this code.
Expected:  linear probe 74.6 top-1 and 67.5 mIoU of a linear head on VOC; with 0.9 75.9 and 66.7;
           ConvNeXt-B 76.3 and 70.4, with 0.9 77.1 and 69.3 (authors' repository).
Notes:     of the authors' command for 16 GPUs. Small views there alternate between both pairs of
           probabilities of blur and solarisation, here each has their mean. The encoder's last norm
           comes after the mean over cells, there before it. Matches are those of `vicregl_r50.py`.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 576


def get_config(arg: str = "0.75") -> ml_collections.ConfigDict:
  if arg not in ("0.75", "0.9"):
    raise ValueError(f"variant {arg!r} is none of 0.75, 0.9")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 400 * STEPS_PER_EPOCH
  config.batch_size = 576
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.convnext", variant="small", drop_path=0.1, layer_scale=0.0, remat="full"
  )
  config.method = dict(
    name="ssljax.methods.vicregl", views=("global", "local"), projector=(8192, 8192, 8192),
    map_projector=(512, 512, 512), projector_norm="layer", alpha=float(arg), matches=(20, 4),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.multi_crop", size=(224, 224), scale=(0.4, 1.0), local_views=6,
      local_size=(96, 96), local_scale=(0.08, 0.4), jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(1.0, 0.1, 0.55), solarize=(0.0, 0.2, 0.1), boxes=True,
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.05)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=5e-4, per=256, warmup_steps=10 * STEPS_PER_EPOCH,
    end=5e-4 * 576 / 256 / 1000,
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
