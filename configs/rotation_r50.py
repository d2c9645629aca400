"""RotNet on ImageNet-1k (Gidaris et al. 2018, arXiv 1803.07728), ResNet-50, 70 epochs, batch 128.

Command:   python -m ssljax.main --config=configs/rotation_r50.py --workdir=runs/rotation_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  mmselfsup, whose recipe this is: k-NN 12.4, VOC detection AP50 79.67. VISSL, 105 epochs
           of one turn of each image at rate .1·B/256: linear probe 48.2 top-1.
Notes:     a step sees 512 images, four turns of each. The warm-up moves once an epoch there, every
           step here.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 128


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 70 * STEPS_PER_EPOCH
  config.batch_size = 128
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50")
  config.method = dict(name="ssljax.methods.pretext.rotation")
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(name="ssljax.data.views.crop_flip", size=(224, 224), scale=(0.08, 1.0)),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4)
  config.schedule = dict(
    name="ssljax.schedules.warmup_multistep", base=0.2, per=0, warmup_start=0.02,
    warmup_steps=5 * STEPS_PER_EPOCH, milestones=(30 * STEPS_PER_EPOCH, 50 * STEPS_PER_EPOCH),
  )  # fmt: skip
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=70 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=10 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
