"""RotNet on CIFAR-10 (Gidaris et al. 2018, arXiv 1803.07728), ResNet-18, 200 epochs, batch 128.

Command:   python -m ssljax.main --config=configs/rotation_cifar10.py \
             --workdir=runs/rotation_cifar10 --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no published number for this encoder: the paper's is a network in network of four blocks.
           `top1` is of the question, chance 0.25.
Notes:     the paper's rate, decay and steps. The views are inception crops of .6 of the picture or
           more. A step sees 512 pictures, four turns of each.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 128


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 128
  config.encoder = dict(name="ssljax.models.resnet", variant="18", stem="cifar", zero_init=False)
  config.method = dict(name="ssljax.methods.pretext.rotation")
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(name="ssljax.data.views.crop_flip", size=(32, 32), scale=(0.6, 1.0)),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )
  config.optimizer = dict(name="ssljax.optim.sgd", nesterov=True, weight_decay=5e-4)
  config.schedule = dict(
    name="ssljax.schedules.warmup_multistep", base=0.1, per=0, factor=0.2,
    milestones=(60 * STEPS_PER_EPOCH, 120 * STEPS_PER_EPOCH, 160 * STEPS_PER_EPOCH),
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
