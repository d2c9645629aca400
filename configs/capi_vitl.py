"""CAPI (Darcet et al. 2025, arXiv 2502.08769), ViT-L/14, 500,000 steps of 16,384 images.

Command:   python -m ssljax.main --config=configs/capi_vitl.py --workdir=runs/capi_vitl \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  this recipe has not been run to the end with this code.
Expected:  attentive probe 82.9 top-1 on ImageNet-1k after pre-training on it (paper).
Deviates from the released code: layer norms with biases and fixed positions added to the tokens
instead of RMS norms, no biases and rotary positions; registers have no place; one rate and decay
for norms, stem and the rest; a whole cosine instead of its first four fifths; the predictor's drop
path grows with depth; features are pooled from the encoder, not from the predictor's first block.
"""

import ml_collections

from ssljax.config import complete

BATCH = 16_384
STEPS_PER_EPOCH = 1_281_167 // BATCH


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 500_000
  config.batch_size = BATCH
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="L", patch=(14, 14), class_token=False, registers=16,
    pool="mean", eps=1e-5, drop_path=0.2, scan=True, remat="dots",
  )  # fmt: skip
  config.method = dict(
    name="ssljax.methods.capi", clusters=16384, predictor_depth=12, teacher_rate=1e-3,
    teacher_warmup=50_000,
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.6, 1.0)),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    hidden=dict(name="ssljax.data.multiblock.rolled", ratio=0.65, predict=0.05),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.1,
    groups=dict(clustering=dict(factor=0.5, weight_decay=0.01, decay_vectors=True)),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=1e-3, per=0, warmup_steps=50_000
  )
  config.mesh = dict(state="full")
  config.checkpoint = dict(every=1000, keep=2, keep_every=50_000)
  config.eval = dict(
    every=10_000,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
