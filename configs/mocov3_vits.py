"""MoCo v3 with ViT-S/16 on ImageNet-1k (Chen, Xie and He 2021, 2104.02057): 300 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/mocov3_vits.py --workdir=runs/mocov3_vits \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 73.2 top-1 (rate 3), ViT-B/16 76.7: --config.encoder.variant=B.
Notes:     the sum of both directions times 2·temperature (loss_scale 4·.2). Twelve heads, as there;
           the projection of patches keeps its random start (optimizer.groups), whose bias is MAE's
           and not zero; the qkv kernel is drawn as one matrix, theirs as three. Decay is on
           everything. The teacher moves after the step, theirs before the next: the same sequence.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 4096


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="S", heads=12, patch=(16, 16), scan=True, remat="dots"
  )
  config.method = dict(
    name="ssljax.methods.two_view",
    loss=dict(name="ssljax.losses.info_nce_inbatch", temperature=0.2), loss_scale=4 * 0.2,
    projector=(4096, 4096, 256), projector_last="plain", projector_bias="none",
    predictor=(4096, 256), predictor_last="plain", predictor_bias="none",
    target="teacher", momentum=dict(schedule="cosine", start=0.99, end=1.0),
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224),
      scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1),
      blur=(1.0, 0.1), solarize=(0.0, 0.2),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.1, decay_vectors=True,
    groups={"encoder/stem": dict(factor=0.0)},
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1.5e-4, per=256, warmup_steps=40 * STEPS_PER_EPOCH
  )
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
