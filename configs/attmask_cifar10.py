"""AttMask on CIFAR-10 (Kakogeorgiou et al. 2022, 2203.12719), a ViT-Ti/4, 200 epochs, batch 256.

Command:   python -m ssljax.main --config=configs/attmask_cifar10.py --workdir=runs/attmask \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no published number. The recipe is that of ImageNet at the size of the pictures: global
           views of 32 pixels, local ones of 16, fewer prototypes.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.encoder = dict(
    name="ssljax.models.vit", variant="Ti", patch=(4, 4), positions="learned",
    positions_size=(32, 32), positions_resize="offset", drop_path=0.1, init_kernels="normal",
    init_stem="torch",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.self_distillation", prototypes=4096, head_hidden=1024, head_gain="trained",
    patch_weight=1.0, patch_center="all", hide="attended_hint",
    teacher_temperature=dict(schedule="linear", start=0.04, end=0.07, steps=30 * STEPS_PER_EPOCH),
    momentum=dict(schedule="cosine", start=0.996, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.4, 1.0), local_views=6,
      local_size=(16, 16), local_scale=(0.1, 0.4), blur=(0.0, 0.0, 0.0),
    ),
    hidden=dict(name="ssljax.data.masking.view_blocks", ratio=(0.1, 0.5), min_area=4),
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
  config.checkpoint = dict(every=500, keep=2)
  config.log = dict(every=20)
  config.eval = dict(
    every=20 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn", k=(20, 200), temperature=0.1),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k200_T0.1/top1",
  )
  return complete(config)
