"""DenseCL on CIFAR-10 (Wang et al. 2021, arXiv 2011.09157), ResNet-18, 200 epochs, batch 512.

Command:   python -m ssljax.main --config=configs/densecl_cifar10.py --workdir=runs/densecl \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no published number. Views, rate and queue are those of `moco_cifar10.py`; the map of a
           picture has 4×4 places.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test --config.total_steps=19400
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 512


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 512
  config.encoder = dict(name="ssljax.models.resnet", variant="18", stem="cifar", zero_init=False)
  config.method = dict(
    name="ssljax.methods.densecl", projector=(512, 128), dense_projector=(512, 128),
    temperature=0.1, momentum=0.99, queue=4096,
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.two_views", size=(32, 32), scale=(0.08, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.0, 0.0), solarize=(0.0, 0.0),
    ),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=5e-4)
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=0.06, per=0)
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
