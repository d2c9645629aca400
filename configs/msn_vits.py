"""MSN on ImageNet-1k (Assran et al. 2022, arXiv 2204.07141), ViT-S/16, 800 epochs, batch 1024.

Command:   python -m ssljax.main --config=configs/msn_vits.py --workdir=runs/msn_vits \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 76.9 top-1 (paper).
Notes:     the original clips the gradient of encoder and head together, here each has its own
           norm; its rate, decay and momentum are those of a run 1.25 times as long (`stretch`). It
           drops the same 30 places in all of a device's batch, here each example has its own.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 1024
  config.dtype = "bfloat16"
  longer = config.total_steps * 5 // 4
  config.encoder = dict(
    name="ssljax.models.vit", variant="S", patch=(16, 16), positions="learned",
    positions_size=(224, 224), init_kernels="normal", init_stem="kaiming",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.msn", head=(2048, 2048, 256), prototypes=1024,
    momentum=dict(schedule="linear", start=0.996, end=1.0, steps=longer),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.multi_crop", size=(224, 224), scale=(0.3, 1.0), local_views=10,
      local_size=(96, 96), local_scale=(0.05, 0.3), method="bilinear", jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.5, 0.5, 0.5), solarize=(0.0, 0.0, 0.0),
    ),
    hidden=dict(name="ssljax.data.masking.random", ratio=0.15),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, clip=3.0, clip_by="part",
    weight_decay=dict(schedule="cosine", start=0.04, end=0.4, steps=longer),
    groups=dict(prototypes=dict(weight_decay=0.0)),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=15 * STEPS_PER_EPOCH,
    warmup_start=2e-4, end=1e-6, stretch=1.25,
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
