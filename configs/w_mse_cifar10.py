"""W-MSE 2 on CIFAR-10, ResNet-18, the authors' recipe: 1000 epochs, batch 512.

Command:   python -m ssljax.main --config=configs/w_mse_cifar10.py --workdir=runs/w_mse_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  linear probe about 91.5 top-1 (paper, not looked up again); 88.67 by solo-learn's online
           classifier at another rate.
Notes:     Ermolov et al. 2021, arXiv 2007.06346. Sub-batches of 128 are drawn anew each step, the
           same for both views. The original's decay is a part of Adam's gradient, ours is not, and
           its head sees both views together.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test --config.total_steps=97000
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 512


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 512
  config.encoder = dict(name="ssljax.models.resnet", variant="18", stem="cifar", zero_init=False)
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.w_mse", size=128), projector=(1024, 64),
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.two_views", size=(32, 32), scale=(0.2, 1.0), gray=(0.1, 0.1),
      jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.0, 0.0), solarize=(0.0, 0.0),
    ),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.adamw", b2=0.999, weight_decay=1e-6)
  config.schedule = dict(
    name="ssljax.schedules.warmup_multistep", base=3e-3, per=0, warmup_steps=500, factor=0.2,
    milestones=(950 * STEPS_PER_EPOCH, 975 * STEPS_PER_EPOCH),
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
