"""DIET on CIFAR-10 (Balestriero 2023, arXiv 2302.10260), ResNet-18, 1000 epochs, batch 256: every
picture its own class.

Command:   python -m ssljax.main --config=configs/diet_cifar10.py --workdir=runs/diet_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no number for this data. With N pictures the loss begins at ln N, 10.7, and cannot fall
           below 9.1, the entropy of the smoothed labels.
Notes:     public re-implementations add a random erasing with probability .25, which is left out
           here, and end at a thousandth of the peak rate, 0 here. On another number of examples set
           method.examples.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test
           --config.method.examples=50000
"""

import ml_collections

from ssljax.config import complete

EXAMPLES = 45_000
STEPS_PER_EPOCH = EXAMPLES // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.encoder = dict(name="ssljax.models.resnet", variant="18", stem="cifar_pad2")
  config.method = dict(name="ssljax.methods.pretext.diet", examples=EXAMPLES)
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.crop_flip", size=(32, 32), scale=(0.08, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.2), jitter_probability=0.3, gray=0.2, blur=0.2,
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.05, decay_vectors=True
  )
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=256, warmup_steps=10 * STEPS_PER_EPOCH,
    warmup_start=1e-3 / 3,
  )  # fmt: skip
  config.probe = dict(rate=1e-3, classes=10)
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
