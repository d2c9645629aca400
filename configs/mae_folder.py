"""MAE on your own folder of unlabelled images.

Command:   python -m ssljax.main --config=configs/mae_folder.py --workdir=runs/mine \
             --config.data.source=folder:/path/to/images
Sub-folders are searched too; with two or more of them their names are the labels of the k-NN and
linear evaluations. Unreadable files are replaced, counted and listed.
Size:      --config.total_steps, --config.batch_size, --config.encoder.variant=S|B|L,
           --config.data.views.size="(96,96)". 200 epochs over a small folder are a good beginning:
           total_steps = 200 × images / batch_size.
"""

import ml_collections

from ssljax.config import complete


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 20_000
  config.batch_size = 64
  config.encoder = dict(name="ssljax.models.vit", variant="S", patch=(16, 16), pool="mean")
  config.method = dict(
    name="ssljax.methods.masked", layout="drop", head="decoder", target="normalised_pixels",
    decoder_width=256, decoder_depth=4, decoder_heads=8,
  )  # fmt: skip
  config.data = dict(
    source="folder:images",
    split="train",
    eval_train="train[:90%]",
    eval_test="train[90%:]",
    views=dict(name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.2, 1.0)),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.masking.random", ratio=0.75),
  )
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.05)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=6e-4, per=256, warmup_steps=500
  )
  config.checkpoint = dict(every=500, keep=2)
  config.eval = dict(
    every=2000,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
