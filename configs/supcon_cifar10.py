"""SupCon on CIFAR-10 with its labels, ResNet-50, the authors' recipe: 1000 epochs, batch 1024.

Command:   python -m ssljax.main --config=configs/supcon_cifar10.py --workdir=runs/supcon_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  linear head on frozen features 96.0 top-1 (the authors' README, of the test set).
Notes:     Khosla et al. 2020, arXiv 2004.11362. The loss is printed times T / .07, as there. Batch
           norm is over the whole batch, not one GPU's.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test --config.total_steps=48000
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 1024


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 1024
  config.encoder = dict(name="ssljax.models.resnet", variant="50", stem="cifar", zero_init=False)
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.supcon", temperature=0.1, base_temperature=0.07),
    projector=(2048, 128), projector_norm="none", norm_views="together",
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.two_views", size=(32, 32), scale=(0.2, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.0, 0.0), solarize=(0.0, 0.0),
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.5, per=0, warmup_steps=10 * STEPS_PER_EPOCH,
    warmup_start=0.01, end=0.5 * 1e-3,
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
