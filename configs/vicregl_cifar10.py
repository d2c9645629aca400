"""VICRegL on CIFAR-10 (Bardes, Ponce and LeCun 2022, arXiv 2210.01571), ResNet-18, 1000 epochs.

Command:   python -m ssljax.main --config=configs/vicregl_cifar10.py --workdir=runs/vicregl \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no published number. Views, rate and optimizer are those of `vicreg_cifar10.py`; the map
           of a picture has 5×5 cells, of which 10 are kept, as 20 are of 7×7.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test --config.total_steps=195000
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
    name="ssljax.methods.vicregl", projector=(2048, 2048, 2048), map_projector=(512, 512, 512),
    matches=(10, 2),
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.two_views", size=(32, 32), scale=(0.2, 1.0),
      jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(0.0, 0.0), solarize=(0.1, 0.1), boxes=True,
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.lars", weight_decay=1e-4, trust=0.02, clip_trust=True)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=0.3, per=256, warmup_steps=10 * STEPS_PER_EPOCH,
    warmup_start=3e-5,
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
