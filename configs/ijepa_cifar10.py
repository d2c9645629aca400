"""I-JEPA on CIFAR-10, ViT-Ti/4 at 32 px: 64 places, 17 of them seen, four targets of 8.

Command:   python -m ssljax.main --config=configs/ijepa_cifar10.py --workdir=runs/ijepa_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code; 800 epochs need an accelerator.
Expected:  no published number for this size; `std` near 0 would be collapse.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.encoder = dict(
    name="ssljax.models.vit", variant="Ti", patch=(4, 4), class_token=False, pool="mean",
    init_kernels="normal",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.latent_prediction", predictor_width=96, predictor_depth=4,
    teacher_momentum=dict(schedule="linear", start=0.996, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(name="ssljax.data.views.crop_flip", size=(32, 32), scale=(0.3, 1.0)),
    hidden=dict(name="ssljax.data.multiblock"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999,
    weight_decay=dict(schedule="cosine", start=0.04, end=0.4),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=40 * STEPS_PER_EPOCH,
    warmup_start=2e-4, end=1e-6,
  )  # fmt: skip
  config.checkpoint = dict(every=500, keep=2)
  config.log = dict(every=20)
  config.eval = dict(
    every=20 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
