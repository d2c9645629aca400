"""Latent MIM (Wei et al. 2024, arXiv 2407.15837) on CIFAR-10, ViT-Ti/4 at 32 px: 6 of 64 places are
seen, the others told apart.

Command:   python -m ssljax.main --config=configs/latent_mim_cifar10.py \
             --workdir=runs/latent_mim_cifar10 --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code.
Expected:  no published number for this size.
Notes:     everything but the widths is as in latent_mim_vitb.py. Gaps are a quarter of a patch, one
           pixel, which leaves their patches no room to move: pictures are made 40 px large and the
           fifth row and column of each cell left out.

Data:      `experiments/cifar10_npz.py` writes the file: the 50,000 training pictures, of which the
           last 5,000 are held out here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 45_000 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 800 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.encoder = dict(name="ssljax.models.vit", variant="Ti", patch=(4, 4), pool="mean")
  config.method = dict(
    name="ssljax.methods.latent_prediction", predictor="cued", predictor_width=128,
    predictor_depth=3, predictor_heads=4, projector=(1024, 1024, 192), loss="info_nce",
    temperature=0.2, similarity_weight=0.1,
    similarity_goal=dict(schedule="cosine", start=0.75, end=0.25),
    teacher_sees="targets", teacher_momentum=dict(schedule="cosine", start=0.99, end=1.0),
    evaluate="student",
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.gapped_crop", size=(32, 32), patch=(4, 4), gap=1, scale=(0.2, 1.0)
    ),
    hidden=dict(
      name="ssljax.data.multiblock.contexts", clones=1, keep=0.102, adjust=0.0, block=1
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.05,
    groups={"encoder/stem": dict(weight_decay=0.0), "predictor/embed": dict(weight_decay=0.0)},
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1.5e-4, per=256,
    warmup_start=3.75e-5, end=3.75e-5, warmup_steps=40 * STEPS_PER_EPOCH,
  )  # fmt: skip
  config.checkpoint = dict(every=500, keep=2)
  config.log = dict(every=20)
  config.eval = dict(
    every=20 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
