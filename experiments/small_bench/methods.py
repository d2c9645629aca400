"""The runs of the small benchmark: a base config for each encoder, a few lines for each method.

A method is one entry of `METHODS`: its base, and what is different (dicts are merged). To add one,
add lines here; the runs that are there stay as they are.
"""

import copy
from collections.abc import Mapping
from typing import Any

# CIFAR-10's first 10,000 training pictures, judged on 2,000 others; Fashion-MNIST's likewise. Those
# that predict hidden places take LONG: a step of theirs is cheap, and at 400 none but MAE was ahead
# of its untrained encoder.
STEPS, LONG, BATCH = 400, 1600, 128
DATA: dict[str, dict] = {
  "cifar10": dict(
    query="", side=32, test="train[48000:50000]",
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
  ),
  "fashion": dict(
    query="?image=train_images&label=train_labels", side=28, test="train[58000:60000]",
    mean=(0.286,) * 3, std=(0.353,) * 3,
  ),
}  # fmt: skip
RESNET = dict(
  encoder=dict(
    name="ssljax.models.resnet", variant="18", stem="cifar", width=16, blocks=(1, 1, 1, 1),
    zero_init=False,
  ),
  optimizer=dict(name="ssljax.optim.sgd", weight_decay=5e-4),
  schedule=dict(base=0.06),
)  # fmt: skip
VIT = dict(
  encoder=dict(
    name="ssljax.models.vit", width=64, depth=4, heads=2, patch=(4, 4), pool="mean"
  ),
  optimizer=dict(name="ssljax.optim.adamw", b2=0.95, weight_decay=0.05),
  schedule=dict(base=1e-3),
)  # fmt: skip
PAIR = dict(name="ssljax.data.views.two_views", jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.0, 0.0))
CROP = dict(name="ssljax.data.views.crop_flip", scale=(0.2, 1.0))
CROPS = dict(
  name="ssljax.data.views.multi_crop", scale=(0.2, 1.0), local_views=0,
  jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
)  # fmt: skip
LOCAL = CROPS | dict(scale=(0.4, 1.0), local_views=2, local_size=(16, 16), local_scale=(0.1, 0.4))
LEARNED = dict(
  pool="cls", positions="learned", positions_size=(32, 32), positions_resize="offset"
)  # fmt: skip


def merged(base: Mapping, changes: Mapping) -> dict[str, Any]:
  """Nested dicts of both; where both have a value, that of `changes`."""
  result = copy.deepcopy(dict(base))
  for key, value in changes.items():
    both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
    result[key] = merged(result[key], value) if both else copy.deepcopy(value)
  return result


def two_view(loss: str, projector: tuple, arguments: Mapping = {}, **given: Any) -> dict:
  """A method of two views by its loss and projector; arguments: of the loss."""
  name = f"ssljax.losses.{loss}"
  method = dict(
    name="ssljax.methods.two_view", loss=dict(name=name, **arguments), projector=projector, **given
  )
  return dict(method=method, data=dict(views=PAIR))


def masked(hidden: dict, **given: Any) -> dict:
  """A method of hidden places."""
  where = dict(hidden, name=f"ssljax.data.masking.{hidden['name']}")
  method = dict(name="ssljax.methods.masked", **given)
  return dict(method=method, data=dict(views=CROP, hidden=where))


def family(name: str, data: Mapping, **given: Any) -> dict:
  """A method of any other family, and what is different in `data`."""
  return dict(method=dict(name=f"ssljax.methods.{name}", **given), data=dict(data))


def dino(**given: Any) -> dict:
  """Self-distillation between crops."""
  hidden = dict(name="ssljax.data.masking.view_blocks", ratio=(0.1, 0.5), min_area=4)
  data = dict(views=LOCAL) | (dict(hidden=hidden) if "patch_weight" in given else {})
  return family(
    "self_distillation", data, prototypes=1024, head_hidden=256, head_bottleneck=64,
    head_gain="trained", momentum=dict(schedule="cosine", start=0.99, end=1.0), **given,
  ) | dict(encoder=LEARNED, optimizer=dict(clip=3.0, clip_by="tensor"))  # fmt: skip


def latent(hidden: str, **given: Any) -> dict:
  """Prediction of a teacher's features."""
  data = dict(views=CROP, hidden=dict(name=f"ssljax.data.multiblock{hidden}"))
  return family(
    "latent_prediction", data,
    teacher_momentum=dict(schedule="linear", start=0.99, end=1.0), **given,
  )  # fmt: skip


TEACHER = dict(target="teacher", momentum=dict(schedule="cosine", start=0.99, end=1.0))
METHODS: dict[str, tuple[dict, dict]] = {
  "mae": (VIT, masked(
    dict(name="random", ratio=0.75), decoder_width=64, decoder_depth=1, decoder_heads=2,
  )),
  "simmim": (VIT, masked(
    dict(name="units", unit=2, ratio=0.6), layout="replace", head="linear", target="pixels",
    loss="l1",
  ) | dict(total_steps=LONG)),
  # Targets as for audio and in 2.0, blocks scaled as in the paper: as for images, but without
  # scales, all places of a picture became alike, and its features worse than untrained ones.
  "data2vec": (VIT, masked(
    dict(name="block", count=38), layout="replace", head="linear", target="teacher",
    loss="smooth_l1", teacher_momentum=0.999, teacher_layers=2, teacher_norm="instance",
  ) | dict(total_steps=LONG, encoder=dict(layer_scale=0.1))),
  "simclr": (RESNET, two_view(
    "nt_xent", (256, 128), dict(temperature=0.5), projector_last="batch",
  )),
  "moco_v2": (RESNET, two_view(
    "info_nce_queue", (256, 128), dict(temperature=0.1), projector_norm="none", target="teacher",
    momentum=0.99, queue=2048,
  )),
  "moco_v3": (VIT, two_view(
    "info_nce_inbatch", (256, 256, 128), dict(temperature=0.2), loss_scale=0.8,
    projector_last="plain", projector_bias="none", predictor=(256, 128), predictor_last="plain",
    predictor_bias="none", **TEACHER,
  )),
  "byol": (VIT, two_view(
    "normalized_l2", (512, 128), loss_scale=1.0, predictor=(512, 128), **TEACHER,
  )),
  "simsiam": (RESNET, two_view(
    "negative_cosine", (256, 256, 256), projector_last="plain", projector_bias="none",
    predictor=(64, 256), target="stopped",
  ) | dict(
    schedule=dict(warmup_steps=0), optimizer=dict(groups=dict(predictor=dict(hold=0)))
  )),
  "densecl": (RESNET, dict(
    method=dict(
      name="ssljax.methods.densecl", projector=(256, 128), dense_projector=(256, 128),
      temperature=0.1, momentum=0.99, queue=2048,
    ),
    data=dict(views=PAIR),
  )),
  "deepcluster": (RESNET, dict(
    method=dict(
      name="ssljax.methods.deepcluster", examples=10000, projector=(256, 128),
      clusters=(300, 300, 300),
    ),
    data=dict(views=dict(
      name="ssljax.data.views.multi_crop", scale=(0.08, 1.0), local_views=0,
      jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
    )),
    optimizer=dict(freeze=("encoder", "projector"), freeze_steps=10000 // BATCH),
  )),
  "msn": (VIT, dict(
    method=dict(
      name="ssljax.methods.msn", head=(256, 256, 64), head_start="torch", prototypes=128,
      momentum=dict(schedule="linear", start=0.99, end=1.0),
    ),
    data=dict(
      views=dict(
        name="ssljax.data.views.multi_crop", scale=(0.3, 1.0), local_views=2, local_size=(16, 16),
        local_scale=(0.1, 0.3), jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.0, 0.0, 0.0),
        solarize=(0.0, 0.0, 0.0),
      ),
      hidden=dict(name="ssljax.data.masking.random", ratio=0.15),
    ),
    optimizer=dict(groups=dict(prototypes=dict(weight_decay=0.0))),
  )),
  "barlow_twins": (VIT, two_view(
    "barlow_twins", (512, 512), dict(redundancy_weight=0.005), projector_bias="none",
    loss_scale=0.1,
  )),
  "rotation": (RESNET, dict(
    method=dict(name="ssljax.methods.pretext.rotation"),
    data=dict(views=dict(CROP, scale=(0.6, 1.0))),
  )),
  "jigsaw": (RESNET, dict(
    method=dict(
      name="ssljax.methods.pretext.jigsaw", tile=8, permutations=100, projector=(128,)
    ),
    data=dict(views=dict(CROP, scale=(0.6, 1.0), gray=0.66)),
  )),
  "diet": (RESNET, dict(
    method=dict(name="ssljax.methods.pretext.diet", examples=10_000),
    optimizer=dict(name="ssljax.optim.adamw", b2=0.999, weight_decay=0.05),
    schedule=dict(base=1e-3),
    data=dict(views=dict(
      CROP, scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), jitter_probability=0.3, gray=0.2,
    )),
  )),
  "latent_mim": (VIT, family(
    "latent_prediction",
    dict(
      views=dict(name="ssljax.data.gapped_crop", patch=(4, 4), gap=1, scale=(0.2, 1.0)),
      hidden=dict(
        name="ssljax.data.multiblock.contexts", clones=1, keep=0.25, adjust=0.0, block=1
      ),
    ),
    predictor="cued", predictor_width=64, predictor_depth=1, predictor_heads=2,
    projector=(256, 256, 64), loss="info_nce", similarity_weight=0.1,
    similarity_goal=dict(schedule="cosine", start=0.75, end=0.25), teacher_sees="targets",
    teacher_momentum=dict(schedule="cosine", start=0.99, end=1.0), evaluate="student",
  )),
  "vicreg": (RESNET, two_view("vicreg", (512, 512, 512), projector_bias="none", loss_scale=0.1)),
  "vicregl": (RESNET, family(
    "vicregl", dict(views=PAIR | dict(boxes=True)), projector=(512, 512, 512),
    map_projector=(128, 128, 128), matches=(6, 2), similarity_weight=2.5, variance_weight=2.5,
    covariance_weight=0.1,
  )),
  "swav": (RESNET, family(
    "swav", dict(views=CROPS), projector=(256, 128), prototypes=256,
  )),
  "dino": (VIT, dino()),
  "ibot": (VIT, dino(patch_weight=1.0, patch_center="all")),
  "attmask": (VIT, dino(patch_weight=1.0, patch_center="all", hide="attended_hint")),
  "dinov2": (VIT, dino(
    patch_weight=1.0, patch_head="separate", balance="sinkhorn", koleo_weight=0.1,
  )),
  # Kernels of deviation 0.02, the paper's, collapsed at this width (rank 1.1); xavier's did not.
  "ijepa": (VIT, latent("", predictor_width=32, predictor_depth=2) | dict(
    encoder=dict(class_token=False), schedule=dict(base=5e-4), total_steps=LONG
  )),
  # One group: XLA's convolutions in 16 groups go back 50 times as slowly on a CPU. Four contexts of
  # a picture, not 16, and half the steps: as long as the others.
  "data2vec2": (VIT, merged(latent(
    ".contexts", predictor="convolution", predictor_width=64, predictor_depth=2,
    predictor_groups=1, noise=0.01, target_layers=3, loss="l2", class_weight=0.1,
    evaluate="student",
  ), dict(
    encoder=dict(norm="post", init_kernels="normal"), optimizer=dict(clip=4.0),
    total_steps=LONG // 2, data=dict(hidden=dict(clones=4)),
  ))),
  "capi": (VIT, family(
    "capi",
    dict(views=CROP, hidden=dict(name="ssljax.data.multiblock.rolled", ratio=0.65, predict=0.2)),
    clusters=256, predictor_depth=2, teacher_rate=0.01, teacher_warmup=40,
  ) | dict(
    total_steps=LONG, encoder=dict(class_token=False, registers=2),
    optimizer=dict(groups=dict(clustering=dict(factor=0.5, weight_decay=0.01, decay_vectors=True))),
  )),
  "lejepa": (VIT, family(
    "lejepa", dict(views=CROPS | dict(local_views=2, local_size=(32, 32), local_scale=(0.2, 1.0))),
    views=("global", "local"), projector=(256, 256, 16), weight=0.02, directions=256, center="all",
  )),
  "dcl": (RESNET, two_view(
    "decoupled_nce", (256, 128), dict(temperature=0.1), projector_last="batch",
  )),
  "vibcreg": (RESNET, two_view(
    "vibcreg", (512, 512, 512), projector_last="whiten", projector_activation="gelu",
    loss_scale=0.1,
  )),
  "ssl_ey": (RESNET, two_view("ssl_ey", (512, 512, 512), loss_scale=0.1)),
  "w_mse": (RESNET, two_view("w_mse", (512, 32), dict(size=64))),
  "mmcr": (RESNET, two_view(
    "mmcr", (512, 512, 128), projector_bias="none", loss_scale=0.1, target="teacher", momentum=0.99,
  )),
  "supcon": (RESNET, two_view("supcon", (256, 128), dict(temperature=0.1), projector_norm="none")),
  "tico": (RESNET, two_view("tico", (512, 128), **TEACHER)),
  "nnclr": (RESNET, two_view(
    "nnclr", (256, 256, 128), dict(temperature=0.2), projector_last="batch", predictor=(512, 128),
    target="stopped", queue=2048, queued="first",
  )),
  "mochi": (RESNET, two_view(
    "mochi", (256, 128), dict(temperature=0.1, n_hard=256, s=256, s2=64, start=STEPS // 10),
    projector_norm="none", target="teacher", momentum=0.99, queue=2048,
  )),
}  # fmt: skip
FASHION = ("mae", "simclr", "byol", "simsiam")


def config(method: str, data: str, file: str, seed: int, steps: int = 0) -> dict[str, Any]:
  """The config of one run on `file`, an npz; steps: 0 is the method's own number."""
  about = DATA[data]
  size = (about["side"], about["side"])
  base, changes = METHODS[method]
  changes = dict(changes)
  own = changes.pop("total_steps", STEPS)
  steps = steps or own
  whole: dict[str, Any] = dict(
    seed=seed, total_steps=steps, batch_size=BATCH,
    schedule=dict(
      name="ssljax.schedules.warmup_cosine", per=0, warmup_steps=steps // 10
    ),
    data=dict(
      source=f"npz:{file}{about['query']}", split="train[:10000]", eval_train="train[:10000]",
      eval_test=about["test"], mean=about["mean"], std=about["std"],
      eval_views=dict(name="ssljax.data.views.resize_crop", size=size, resize=size[0]),
      views=dict(size=size),
    ),
    probe=dict(rate=1e-3),
    checkpoint=dict(every=100, keep=2),
    log=dict(every=20, tensorboard=False),
    eval=dict(
      every=steps, figures=False, heldout=False, batch_size=500,
      knn=dict(name="ssljax.evals.knn", k=(20,), temperature=0.1),
      linear=dict(name="ssljax.evals.linear"), rank=dict(name="ssljax.evals.rank"),
    ),
  )  # fmt: skip
  return merged(merged(whole, base), changes)
