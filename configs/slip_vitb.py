"""SLIP with a ViT-B/16 (Mu et al. 2021, arXiv 2112.12750) on YFCC15M, 25 epochs, batch 4096.

Command:   python -m ssljax.main --config=configs/slip_vitb.py --workdir=runs/slip_vitb \
             --config.data.source=tar:/data/{split}/*.tar
Data:      as configs/clip_vitb.py.
Hardware:  not run to the end with this code. The original takes 64 GPUs.
Expected:  ImageNet zero-shot 42.8, linear 72.1, fine-tuned 82.6 (README of SLIP).
Notes:     an embedding learns from its own row alone (`row_only_grad`), as in the published runs.
           Vocabulary and length of texts differ from CLIP's, as in configs/clip_vitb.py.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 14_600_000 // 4096


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 25 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), positions="learned",
    init_kernels="normal", scan=True, remat="dots",
  )  # fmt: skip
  text = dict(name="ssljax.models.text", width=512, depth=12, heads=8, scan=True, remat="dots")
  config.method = dict(
    name="ssljax.methods.image_text", text_encoder=text, width=512, row_only_grad=True,
    projector=(4096, 4096, 256), views_weight=1.0, views_temperature=0.1,
  )  # fmt: skip
  config.data = dict(
    source="tar:/data/{split}/*.tar",
    split="yfcc15m",
    eval_train="imagenet_train[:10%]",
    eval_test="imagenet_val",
    views=dict(name="ssljax.data.slip_views", size=(224, 224), image_scale=(0.5, 1.0)),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    text=dict(name="ssljax.data.text.captions", length=32, vocabulary=32768),
  )
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.1,
    no_decay=("cls_token",), limits=(("log_scale", 0.0, 4.6052),),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=3e-3, per=0, warmup_steps=STEPS_PER_EPOCH
  )
  config.checkpoint = dict(every=STEPS_PER_EPOCH // 2, keep=2)
  config.eval = dict(
    every=5 * STEPS_PER_EPOCH,
    heldout=False,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
