"""LeJEPA on CIFAR-10, ViT-Ti/4 at 32 px: the authors' minimal recipe (four equal views, λ 0.02,
256 directions, projector 2048-2048-16; there ViT-S/8 on Imagenette at 128 px, 800 epochs).

Command:   python -m ssljax.main --config=configs/lejepa_cifar10.py --workdir=runs/lejepa_cifar10 \
             --config.data.source=npz:cifar10.npz
Hardware:  not run to the end with this code; 800 epochs need an accelerator.
Expected:  no published number for this size (90.7 on Imagenette, an online linear classifier).
Notes:     `train/sigreg` near 1.05 is a Gaussian, 103 at 256 examples a collapse. The released
           script puts a linear layer of 512 between encoder and projector, which is left out.

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
  config.encoder = dict(
    name="ssljax.models.vit", variant="Ti", patch=(4, 4), init_kernels="normal", drop_path=0.1
  )
  config.method = dict(
    name="ssljax.methods.lejepa", views=("global", "local"), projector=(2048, 2048, 16),
    weight=0.02, directions=256, center="all",
  )  # fmt: skip
  config.data = dict(
    source="npz:cifar10.npz",
    split="train[:45000]",
    eval_train="train[:45000]",
    eval_test="train[45000:50000]",
    eval_views=dict(name="ssljax.data.views.resize_crop", size=(32, 32), resize=32),
    views=dict(
      name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.08, 1.0), local_views=2,
      local_size=(32, 32), local_scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur_kernel=3,
      blur=(0.5, 0.5, 0.5), solarize=(0.2, 0.2, 0.2),
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )  # fmt: skip
  config.optimizer = dict(name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=5e-2)
  config.schedule = dict(
    name="ssljax.schedules.warmup_cosine", base=2e-3, per=0, warmup_steps=STEPS_PER_EPOCH,
    warmup_start=2e-5, end=1e-3,
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
