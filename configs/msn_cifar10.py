"""MSN on CIFAR-10 (Assran et al. 2022, arXiv 2204.07141), a ViT-Ti/4, 200 epochs, batch 256.

Command:   python -m ssljax.main --config=configs/msn_cifar10.py --workdir=runs/msn \
             --config.data.source=npz:cifar10.npz
           `:pmsn` has the power law of PMSN (2210.07277) over prototypes, for classes of unlike
           size; CIFAR-10's are alike.
Hardware:  not run to the end with this code.
Expected:  no published number. The recipe is that of ImageNet at the size of the pictures: views of
           32 and 16 pixels, fewer prototypes.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  if arg not in ("", "pmsn"):
    raise ValueError(f"variant {arg!r} is none of pmsn")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 256
  longer = config.total_steps * 5 // 4
  config.encoder = dict(
    name="ssljax.models.vit", variant="Ti", patch=(4, 4), positions="learned",
    positions_size=(32, 32), init_kernels="normal", init_stem="kaiming",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.msn", head=(1024, 1024, 256), prototypes=256,
    momentum=dict(schedule="linear", start=0.996, end=1.0, steps=longer),
    iterations=0 if arg == "pmsn" else 3, prior_exponent=0.25 if arg == "pmsn" else 0.0,
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.3, 1.0), local_views=6,
      local_size=(16, 16), local_scale=(0.1, 0.3), method="bilinear", jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
    ),
    hidden=dict(name="ssljax.data.masking.random", ratio=0.15),
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
