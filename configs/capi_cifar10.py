"""CAPI on CIFAR-10, ViT-Ti/4 at 32 px: 64 places, 23 of them seen, 8 predicted, 512 clusters.

Command:   python -m ssljax.main --config=configs/capi_cifar10.py --workdir=runs/capi_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code; 800 epochs need an accelerator.
Expected:  no published number for this size; `prototype_use` near 0 would be collapse.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 512


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 512
  config.encoder = dict(
    name="ssljax.models.vit", variant="Ti", patch=(4, 4), class_token=False, registers=4,
    pool="mean",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.capi", clusters=512, predictor_depth=4, teacher_rate=4e-3,
    teacher_warmup=20 * STEPS_PER_EPOCH,
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(name="ssljax.data.views.crop_flip", size=(32, 32), scale=(0.6, 1.0)),
    hidden=dict(name="ssljax.data.multiblock.rolled", ratio=0.65, predict=0.2),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", weight_decay=0.1,
    groups=dict(clustering=dict(factor=0.5, weight_decay=0.01, decay_vectors=True)),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=20 * STEPS_PER_EPOCH
  )
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
