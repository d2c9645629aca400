"""CLIP with a ViT-B/16 (Radford et al. 2021, arXiv 2103.00020) on YFCC15M, 25 epochs, batch 4096,
as the baseline of SLIP (Mu et al. 2021, arXiv 2112.12750).

Command:   python -m ssljax.main --config=configs/clip_vitb.py --workdir=runs/clip_vitb \
             --config.data.source=tar:/data/{split}/*.tar
Data:      shards of pairs, KEY.jpg and KEY.txt (or KEY.json with a caption), in /data/yfcc15m;
           ImageNet with KEY.cls in /data/imagenet_train and /data/imagenet_val for k-NN and linear
           probe. data.text.names with its 1,000 class names and data.text.templates switch on
           --config.eval.zero_shot.name=ssljax.evals.zero_shot.
Hardware:  not run to the end with this code.
Expected:  ImageNet zero-shot 37.6, linear 66.5, fine-tuned 80.5 (README of SLIP).
Variants:  configs/clip_vitb.py:flip hides half of the patches (FLIP, Li et al. 2022, arXiv
           2212.00794), mean-pooled, with scale 100 from the start.
Notes:     the vocabulary is learnt from the captions at hand, not CLIP's 49,408 byte pairs; texts
           have 32 ids, not 77. Rates and decay are the README's.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 14_600_000 // 4096


def get_config(arg: str = "clip") -> ml_collections.ConfigDict:
  if arg not in ("clip", "flip"):
    raise ValueError(f"variant {arg!r} is neither clip nor flip")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 25 * STEPS_PER_EPOCH
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.encoder = dict(
    name="ssljax.models.vit", variant="B", patch=(16, 16), positions="learned",
    init_kernels="normal", pool="mean" if arg == "flip" else "cls", scan=True, remat="dots",
  )  # fmt: skip
  text = dict(name="ssljax.models.text", width=512, depth=12, heads=8, scan=True, remat="dots")
  config.method = dict(name="ssljax.methods.image_text", text_encoder=text, width=512)
  if arg == "flip":
    config.method.name = "ssljax.methods.image_text.flip"
  config.data = dict(
    source="tar:/data/{split}/*.tar",
    split="yfcc15m",
    eval_train="imagenet_train[:10%]",
    eval_test="imagenet_val",
    views=dict(
      name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.5, 1.0), flip=arg == "flip"
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
    text=dict(name="ssljax.data.text.captions", length=32, vocabulary=32768),
  )  # fmt: skip
  if arg == "flip":
    config.data.hidden = dict(name="ssljax.data.masking.random", ratio=0.5)
  config.optimizer = dict(
    name="ssljax.optim.adamw", b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.5,
    no_decay=("cls_token",), limits=(("log_scale", 0.0, 4.6052),),
  )  # fmt: skip
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=5e-4, per=0, warmup_steps=STEPS_PER_EPOCH
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
