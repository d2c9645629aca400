"""MAE on CIFAR-10, ViT-Ti/4 at 32 px.

Command:   python -m ssljax.main --config=configs/mae_cifar10.py --workdir=runs/mae_cifar10 \
             --config.data.source=npz:cifar10.npz
           with `image` [n 32 32 3] and `label` [n] in the file (experiments/cifar10_npz.py), or
           --config.data.source=tfds:cifar10 --config.data.split=train \
             --config.data.eval_train=train --config.data.eval_test=test
Hardware:  see experiments/mae_cifar10 for a run on two CPU cores; 800 epochs need an accelerator.
"""

import ml_collections

from ssljax.config import complete


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.batch_size = 256
  config.total_steps = 800 * (45_000 // 256)
  config.encoder = dict(name="ssljax.models.vit", variant="Ti", patch=(4, 4), pool="mean")
  config.method = dict(
    name="ssljax.methods.masked", layout="drop", head="decoder", target="normalised_pixels",
    decoder_width=128, decoder_depth=2, decoder_heads=4,
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(name="ssljax.data.views.crop_flip", size=(32, 32), scale=(0.2, 1.0)),
    hidden=dict(name="ssljax.data.masking.random", ratio=0.75),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.05)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=10 * (45_000 // 256)
  )
  config.checkpoint = dict(every=500, keep=2)
  config.log = dict(every=20)
  config.eval = dict(
    every=20 * (45_000 // 256),
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
