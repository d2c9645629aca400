"""DenseCL on ImageNet-1k (Wang et al. 2021, arXiv 2011.09157), ResNet-50, 200 epochs, batch 256.

Command:   python -m ssljax.main --config=configs/densecl_r50.py --workdir=runs/densecl_r50 \
             --config.data.source=tar:/data/imagenet/{split}/*.tar
Hardware:  not run to the end with this code.
Expected:  linear probe 63.5 top-1, k-NN (k 20) 48.5 (mmselfsup's run). It is made for dense tasks:
           58.7 AP on Pascal VOC detection against MoCo v2's 57.0 (README of the original).
Notes:     batch norm is over the global batch, which leaks nothing between queries and keys: the
           original's shuffling of the keys between devices has nothing to mend here. The scores of
           places are 3.3 GB over all devices.
"""

import ml_collections

from ssljax.config import complete

STEPS_PER_EPOCH = 1_281_167 // 256


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.encoder = dict(name="ssljax.models.resnet", variant="50", zero_init=False)
  config.method = dict(
    name="ssljax.methods.densecl", projector=(2048, 128), dense_projector=(2048, 128),
    temperature=0.2, dense_weight=0.5, momentum=0.999, queue=65536,
  )  # fmt: skip
  config.data = dict(
    source="tfds:imagenet2012",
    split="train",
    eval_train="train[:10%]",
    eval_test="validation",
    views=dict(
      name="ssljax.data.views.two_views", size=(224, 224), scale=(0.2, 1.0),
      jitter=(0.4, 0.4, 0.4, 0.1),
      blur=(0.5, 0.5), solarize=(0.0, 0.0),
    ),
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(224, 224), resize=256),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.sgd", weight_decay=1e-4)
  config.schedule = dict(name="ssljax.schedules.warmup_cosine", base=0.03, per=256)
  config.checkpoint = dict(every=STEPS_PER_EPOCH, keep=2, keep_every=100 * STEPS_PER_EPOCH)
  config.eval = dict(
    every=25 * STEPS_PER_EPOCH,
    knn=dict(name="ssljax.evals.knn"),
    linear=dict(name="ssljax.evals.linear"),
    rank=dict(name="ssljax.evals.rank"),
    best="knn_k20_T0.07/top1",
  )
  return complete(config)
