"""I-JEPA on ImageNet-1k (Assran et al. 2023, arXiv 2301.08243), ViT-H/14, 300 epochs.

Command:   python -m ssljax.main --config=configs/ijepa_vith.py --workdir=runs/ijepa_vith \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
           `:vitb16`, `:vitl16` for the other sizes of the paper (600 epochs).
Hardware:  this recipe has not been run to the end with this code.
Expected:  linear top-1 79.3 (paper, ViT-H/14); 77.5 ViT-L/16, 72.9 ViT-B/16.
Deviates from the released code in one place, counts of places that do not change: contexts have 69
of 256 and targets 35 in every example, cut at random. There a loader batch shares one size of block
(35 to 54 places) and is cut to its shortest context, 69 at 128 images, from the bottom up.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 2048
# variant -> encoder, patch, epochs, depth of the predictor
SIZES = {
  "vith14": ("H", (14, 14), 300, 12),
  "vitl16": ("L", (16, 16), 600, 12),
  "vitb16": ("B", (16, 16), 600, 6),
}


def get_config(arg: str = "vith14") -> ml_collections.ConfigDict:
  if arg not in SIZES:
    raise ValueError(f"variant {arg!r} is none of {', '.join(SIZES)}")
  variant, patch, epochs, depth = SIZES[arg]
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = epochs * STEPS_PER_EPOCH
  config.batch_size = 2048
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant=variant, patch=patch, class_token=False, pool="mean",
    init_kernels="normal", scan=True,
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.latent_prediction", predictor_width=384, predictor_depth=depth,
    loss="smooth_l1", loss_beta=1.0,
    teacher_momentum=dict(schedule="linear", start=0.996, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.3, 1.0), method="bilinear",
      flip=False,
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.multiblock", released=True),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999,
    weight_decay=dict(schedule="cosine", start=0.04, end=0.4),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=40 * STEPS_PER_EPOCH,
    warmup_start=2e-4, end=1e-6,
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=20 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
