"""AttMask on ImageNet-1k (Kakogeorgiou et al. 2022, arXiv 2203.12719), ViT-S/16, 100 epochs of 240.

Command:   python -m ssljax.main --config=configs/attmask_vits.py --workdir=runs/attmask_vits \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  k-NN 72.8, linear probe 76.1 top-1 with hints; `:high` 72.5 and 75.7 (README of the
           original).
Notes:     iBOT whose hidden places are those that the teacher attends to. The original draws how
           many once a batch, here every view has its own number.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 240


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  if arg not in ("", "high"):
    raise ValueError(f"variant {arg!r} is none of high")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 100 * STEPS_PER_EPOCH
  config.batch_size = 240
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="S", patch=(16, 16), positions="learned",
    positions_size=(224, 224), positions_resize="offset", drop_path=0.1, init_kernels="normal",
    init_stem="torch",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.self_distillation", prototypes=8192, head_gain="trained",
    patch_weight=1.0, patch_head="shared", patch_center="all",
    hide="attended" if arg == "high" else "attended_hint",
    teacher_temperature=dict(
      schedule="linear", start=0.04, end=0.07, steps=29 * STEPS_PER_EPOCH, every=STEPS_PER_EPOCH
    ),
    momentum=dict(schedule="cosine", start=0.996, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.multi_crop", size=(224, 224), scale=(0.25, 1.0), local_views=10,
      local_size=(96, 96), local_scale=(0.05, 0.25),
    ),
    hidden=dict(name="ssljax.data.masking.view_blocks", ratio=(0.1, 0.5), probability=0.5),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, clip=3.0, clip_by="tensor",
    weight_decay=dict(schedule="cosine", start=0.04, end=0.4),
    freeze=("last_layer",), freeze_steps=STEPS_PER_EPOCH,
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=5e-4, per=256, end=1e-6,
    warmup_steps=10 * STEPS_PER_EPOCH,
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
