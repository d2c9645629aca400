"""SwAV on CIFAR-10, ResNet-18, lightly's benchmark: two views and no more, 200 epochs, batch 512.

Command:   python -m ssljax.main --config=configs/swav_cifar10.py --workdir=runs/swav \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  k-NN (k 200, T .1) 84.2 top-1, the best of all epochs (lightly's documentation).
Notes:     lightly's prototypes have a bias; here they have none, as in the original. `:queue` is
           solo-learn's recipe instead: 3,000 prototypes, a queue of 3,840 from epoch 50, LARS,
           1,000 epochs, batch 256; 89.17 top-1 of a linear classifier trained along.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here. Published numbers are of all 50,000 and the test set:
           --config.data.source=tfds:cifar10 --config.data.split=train
           --config.data.eval_train=train --config.data.eval_test=test --config.total_steps=19400
"""

import ml_collections

from ssljax.config import complete


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  if arg not in ("", "queue"):
    raise ValueError(f"variant {arg!r} is none of queue")
  queue = arg == "queue"
  epochs, batch_size = (1000, 256) if queue else (200, 512)
  epoch = 45_000 // batch_size
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = epochs * epoch
  config.batch_size = batch_size
  config.encoder = dict(
    name="ssljax.models.resnet", variant="18", stem="cifar_pad2" if queue else "cifar",
    zero_init=False,
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.swav", projector=(2048, 128) if queue else (512, 128),
    prototypes=3000 if queue else 512, prototypes_unit="use" if queue else "start",
    queue=3840 if queue else 0, queue_from=50 * epoch if queue else 0,
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.08 if queue else 0.14, 1.0),
      local_views=0, jitter=(0.8, 0.8, 0.8, 0.2), blur_kernel=3,
      blur=(0.5, 0.5, 0.5) if queue else (0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
    ),
  )  # fmt: skip
  if queue:
    config.optimizer = dict(
      name="ssljax.optim.lars", weight_decay=1e-6, trust=0.02, clip_trust=True,
      freeze=("prototypes",), freeze_steps=2 * epoch,
    )  # fmt: skip
    config.schedule = dict(
      name="ssljax.schedules.warmup_cosine", base=0.6, per=256, warmup_start=3e-5,
      warmup_steps=10 * epoch,
    )  # fmt: skip
  else:  # Adam; its L2 term of 1e-6 is nothing beside the gradients
    config.optimizer = dict(
      name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.0, unit=("prototypes",)
    )
    config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=1e-3, per=128)
  config.checkpoint = dict(every=500, keep=2)
  config.log = dict(every=20)
  config.eval = dict(
    every=20 * epoch,
    knn=dict(name="ssljax.evals.knn", k=(20, 200), temperature=0.1),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k200_T0.1/top1",
  )
  return complete(config)
