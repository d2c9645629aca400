"""DeepCluster-v2 on CIFAR-10, ResNet-18, solo-learn's recipe: two views, 1,000 epochs, batch 256.

Command:   python -m ssljax.main --config=configs/deepcluster_cifar10.py --workdir=runs/clusters \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  88.85 top-1 of a linear classifier trained along (solo-learn).
Notes:     the first epoch fills the bank, and nothing moves but batch norm's statistics.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test
           --config.method.examples=50000 --config.total_steps=195000
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1000 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.encoder = dict(
    name="ssljax.models.resnet", variant="18", stem="cifar_pad2", zero_init=False
  )
  config.method = dict(
    name="ssljax.methods.deepcluster", examples=45_000, projector=(2048, 128),
    clusters=(3000, 3000, 3000),
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.08, 1.0), local_views=0,
      jitter=(0.8, 0.8, 0.8, 0.2), blur=(0.5, 0.5, 0.5), blur_kernel=3, solarize=(0.0, 0.0, 0.0),
    ),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.lars", weight_decay=1e-6, trust=0.02, clip_trust=True,
    freeze=("encoder", "projector"), freeze_steps=STEPS_PER_EPOCH,
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.6, per=256, warmup_start=3e-5, end=6e-4,
    warmup_steps=11 * STEPS_PER_EPOCH,
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
