"""CLIP on handwritten digits and sentences about them: learns in minutes on two CPU cores.

Command:   python -m ssljax.main --config=configs/clip_digits.py --workdir=runs/clip_digits
Notes:     the sentences name the class ("a photo of the digit seven."), so that this is learning
           with labels: it shows that pairs, towers and the zero-shot evaluation work together.
"""

import ml_collections

from ssljax.config import complete

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 600
  config.batch_size = 64
  config.encoder = dict(
    name="ssljax.models.vit", width=64, depth=3, heads=4, patch=(2, 2), pool="mean"
  )
  config.method = dict(
    name="ssljax.methods.image_text", width=32,
    text_encoder=dict(name="ssljax.models.text", width=64, depth=1, heads=4),
  )  # fmt: skip
  config.data = dict(
    source="digits",
    channels=1,
    eval_train="train",
    eval_test="test",
    text=dict(
      name="ssljax.data.text.captions", length=16, vocabulary=320, names=NAMES,
      templates=("a photo of the digit {}.", "{}, written by hand.", "the number {}."),
    ),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.98, weight_decay=0.05,
    limits=(("log_scale", 0.0, 4.6052),),
  )  # fmt: skip
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=2e-3, per=0, warmup_steps=50)
  config.checkpoint = dict(every=300, keep=2)
  config.log = dict(every=50)
  config.eval = dict(
    every=300,
    batch_size=360,
    zero_shot=dict(name="ssljax.evals.zero_shot"),
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear", l2=(1e-1, 1e-2, 1e-3)),
    rank=dict(name="ssljax.evals.rank"),
    best="zero_shot/top1",
  )
  return complete(config)
