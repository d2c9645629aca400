"""The smallest runs that go through everything: width 32, depth 2, 8×8 places."""

import copy
from typing import Any

import numpy as np

ENCODER = dict(name="ssljax.models.vit", width=32, depth=2, heads=2, patch=(4, 4))
RESNET = dict(
  name="ssljax.models.resnet", variant="18", stem="cifar_pool", width=8, blocks=(1, 1, 1)
)
CONVNEXT = dict(
  name="ssljax.models.convnext", stem=2, blocks=(1, 1, 1), widths=(8, 16, 32), layer_scale=0.1,
  drop_path=0.1,
)  # fmt: skip
TWO_VIEW = dict(
  name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.nt_xent", temperature=0.5),
  projector=(32, 16),
)  # fmt: skip
IMAGE_TEXT = dict(
  name="ssljax.methods.image_text", width=16,
  text_encoder=dict(name="ssljax.models.text", width=32, depth=1, heads=2),
)  # fmt: skip
TEXTS = dict(text=dict(name="ssljax.data.text.captions", length=12, vocabulary=300))
RELATIVE = dict(positions="relative", qkv_bias="qv", layer_scale=0.1, pool="mean")
NO_CLASS = dict(class_token=False, pool="mean", init_kernels="normal")
LATENT = dict(
  name="ssljax.methods.latent_prediction", predictor_width=32, predictor_depth=1,
  teacher_momentum=0.9,
)  # fmt: skip
MULTIBLOCK = dict(hidden=dict(name="ssljax.data.multiblock"))
# Mild views: a tiny network sees in some dozen steps that they belong together.
PAIR = dict(
  name="ssljax.data.views.two_views", size=(32, 32), scale=(0.6, 1.0), jitter=(0.2, 0.2, 0.2, 0.05),
  blur=(0.5, 0.1), solarize=(0.0, 0.2),
)  # fmt: skip
PAIRED = dict(views=PAIR)
CROPS = dict(
  name="ssljax.data.views.multi_crop", size=(32, 32), scale=(0.5, 1.0), local_views=2,
  local_size=(16, 16), local_scale=(0.2, 0.5), jitter=(0.2, 0.2, 0.2, 0.05), blur_kernel=3,
)  # fmt: skip
DINO = dict(
  name="ssljax.methods.self_distillation", prototypes=24, head_hidden=32, head_bottleneck=16,
  head_start="torch", momentum=0.9,
)  # fmt: skip
MSN = dict(
  name="ssljax.methods.msn", head=(32, 16), head_start="torch", prototypes=24, momentum=0.9
)
DROPPED = dict(views=CROPS, hidden=dict(name="ssljax.data.masking.random", ratio=0.25))
SWAV = dict(name="ssljax.methods.swav", projector=(32, 16), prototypes=24)
VICREGL = dict(name="ssljax.methods.vicregl", projector=(32, 16), map_projector=(32, 16))
LOCAL = dict(positions="learned", positions_size=(32, 32), positions_resize="offset")

# One line a method: (arguments of the encoder, of the method, keys of `data`).
METHODS: dict[str, tuple[dict, dict, dict]] = {
  "mae": (
    {},
    dict(name="ssljax.methods.masked", decoder_width=32, decoder_depth=1, decoder_heads=2),
    dict(hidden=dict(name="ssljax.data.masking.random", ratio=0.75)),
  ),
  "simmim": (
    RELATIVE | dict(init_kernels="beit", depth_scale=True),
    dict(
      name="ssljax.methods.masked", layout="replace", head="linear", target="pixels", loss="l1"
    ),
    dict(hidden=dict(name="ssljax.data.masking.units", unit=2, ratio=0.6)),
  ),
  "data2vec": (
    RELATIVE | dict(init_kernels="beit", drop_path=0.1),
    dict(
      name="ssljax.methods.masked", layout="replace", head="linear", target="teacher",
      loss="smooth_l1", teacher_momentum=0.9, teacher_layers=2,
    ),
    dict(hidden=dict(name="ssljax.data.masking.block", count=38)),
  ),
  "simclr": (RESNET, TWO_VIEW | dict(norm_views="together", projector_last="scale"), PAIRED),
  "simclr_vit": (dict(drop_path=0.1), TWO_VIEW | dict(projector_norm="none"), PAIRED),
  "simclr_convnext": (CONVNEXT, TWO_VIEW | dict(projector_norm="none"), PAIRED),
  "barlow_twins": (
    {}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.barlow_twins"), loss_scale=0.1), PAIRED
  ),
  "vicreg": (RESNET, TWO_VIEW | dict(loss=dict(name="ssljax.losses.vicreg")), PAIRED),
  "moco": (
    RESNET,
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.info_nce_queue", temperature=0.2), projector_norm="none",
      target="teacher", symmetric=False, momentum=0.9, queue=32,
    ),
    PAIRED,
  ),
  "densecl": (
    RESNET,
    dict(
      name="ssljax.methods.densecl", projector=(32, 16), dense_projector=(32, 16), momentum=0.9,
      queue=32,
    ),
    PAIRED,
  ),
  "vicregl": ({}, VICREGL, dict(views=PAIR | dict(boxes=True))),
  "vicregl_crops": (
    CONVNEXT,
    VICREGL | dict(
      views=("global", "local"), projector_norm="layer", matches=(6, 2), feature_matches=(12, 4),
    ),
    dict(views=CROPS | dict(boxes=True)),
  ),
  "byol": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.normalized_l2"), loss_scale=2.0, projector_bias="hidden",
      predictor=(32, 16), predictor_bias="hidden", target="teacher", momentum=0.9,
    ),
    PAIRED,
  ),
  "simsiam": (
    RESNET,
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.negative_cosine"), projector=(32, 32, 32),
      projector_last="plain", projector_bias="none", predictor=(16, 32), target="stopped",
    ),
    PAIRED,
  ),
  "mocov3": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.info_nce_inbatch", temperature=0.2), loss_scale=0.8,
      projector=(32, 32, 16), projector_last="plain", projector_bias="none", predictor=(32, 16),
      predictor_last="plain", predictor_bias="none", target="teacher", momentum=0.9,
    ),
    PAIRED,
  ),
  "dcl": (
    {}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.decoupled_nce", temperature=0.5, sigma=0.5)),
    PAIRED,
  ),
  "vibcreg": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.vibcreg"), projector_last="whiten", whiten_groups=4,
      projector_bias="all", projector_activation="gelu",
    ),
    PAIRED,
  ),
  "ssl_ey": ({}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.ssl_ey")), PAIRED),
  "w_mse": (
    {}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.w_mse", size=8), projector=(32, 4)), PAIRED
  ),
  "mmcr": (
    {},
    TWO_VIEW | dict(loss=dict(name="ssljax.losses.mmcr"), target="teacher", momentum=0.9), PAIRED
  ),
  "supcon": (
    {}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.supcon", temperature=0.2)), PAIRED
  ),
  "tico": (
    {}, TWO_VIEW | dict(loss=dict(name="ssljax.losses.tico"), target="teacher", momentum=0.9),
    PAIRED,
  ),
  "nnclr": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.nnclr", temperature=0.2), predictor=(32, 16), target="stopped",
      queue=32, queued="first",
    ),
    PAIRED,
  ),
  "mochi": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.mochi", temperature=0.2, n_hard=8, s=4, s2=2),
      projector_norm="none", target="teacher", symmetric=False, momentum=0.9, queue=32,
    ),
    PAIRED,
  ),
  "terms": (
    {},
    TWO_VIEW | dict(
      loss=dict(name="ssljax.losses.alignment"),
      terms=dict(
        entropy=dict(name="ssljax.losses.von_neumann_entropy", weight=-1.0),
        dimension=dict(name="ssljax.losses.ldreg", neighbours=4, on="pooled"),
      ),
    ),
    PAIRED,
  ),
  "dino": (LOCAL | dict(drop_path=0.1), DINO, dict(views=CROPS)),
  "dino_resnet": (RESNET, DINO, dict(views=CROPS)),
  "ibot": (
    {},
    DINO | dict(patch_weight=1.0),
    dict(views=CROPS, hidden=dict(name="ssljax.data.masking.view_blocks")),
  ),
  "attmask": (
    dict(registers=1),
    DINO | dict(patch_weight=1.0, hide="attended_hint"),
    dict(views=CROPS, hidden=dict(name="ssljax.data.masking.view_blocks")),
  ),
  "dinov2": (
    dict(registers=2, layer_scale=0.1),
    DINO | dict(
      balance="sinkhorn", head_gain="trained", patch_weight=1.0, patch_head="separate",
      patch_center="hidden", koleo_weight=0.1,
    ),
    dict(views=CROPS, hidden=dict(name="ssljax.data.masking.view_blocks", min_area=4)),
  ),
  "msn": (LOCAL | dict(drop_path=0.1), MSN, DROPPED),
  "pmsn": ({}, MSN | dict(iterations=0, prior_exponent=0.25, evaluate="student"), DROPPED),
  "swav": (RESNET, SWAV, dict(views=CROPS)),
  "swav_queue": ({}, SWAV | dict(queue=32, queue_from=1), dict(views=CROPS)),
  "deepcluster": (
    {},
    dict(
      name="ssljax.methods.deepcluster", examples=64, projector=(32, 16), clusters=(6, 5), every=2,
    ),
    dict(views=CROPS | dict(local_views=0)),
  ),
  "lejepa": (
    {},
    dict(
      name="ssljax.methods.lejepa", projector=(32, 16), weight=0.1, directions=64, center="first"
    ),
    PAIRED,
  ),
  "lejepa_resnet": (
    RESNET, dict(name="ssljax.methods.lejepa", projector=(32, 16), directions=64), PAIRED
  ),
  "capi": (
    dict(drop_path=0.1, registers=1),
    dict(
      name="ssljax.methods.capi", clusters=24, predictor_depth=1, teacher_rate=0.1,
    ),
    dict(hidden=dict(name="ssljax.data.multiblock.rolled", predict=0.2)),
  ),
  "rotation": (RESNET, dict(name="ssljax.methods.pretext.rotation"), {}),
  "jigsaw": (
    dict(drop_path=0.1),
    # The middle tile of nine alone has the corner of a square, and is elsewhere in each order.
    dict(name="ssljax.methods.pretext.jigsaw", tile=8, permutations=9, projector=(32,)),
    {},
  ),
  "diet": ({}, dict(name="ssljax.methods.pretext.diet", examples=64, smoothing=0.2), {}),
  "ijepa": (NO_CLASS, LATENT, MULTIBLOCK),
  "stop": (NO_CLASS, LATENT | dict(noise=0.25), MULTIBLOCK),
  "latent_mim": (
    {},
    LATENT | dict(
      predictor="cued", loss="info_nce", teacher_sees="targets", projector=(48, 32),
      similarity_weight=0.1,
    ),
    dict(hidden=dict(name="ssljax.data.multiblock.contexts", clones=1, block=1, adjust=0.0)),
  ),
  "data2vec2": (
    dict(norm="post", init_kernels="normal"),
    LATENT | dict(
      predictor="convolution", predictor_width=32, predictor_depth=2, predictor_groups=4,
      noise=0.01, target_layers=2, loss="l2", class_weight=0.1, evaluate="student",
    ),
    dict(hidden=dict(name="ssljax.data.multiblock.contexts", clones=2)),
  ),
  "clip": (dict(drop_path=0.1), IMAGE_TEXT, TEXTS),
  "siglip": (
    dict(pool="mean"), IMAGE_TEXT | dict(loss="siglip", project="text", scale=10.0), TEXTS
  ),
  "slip": (
    {},
    IMAGE_TEXT | dict(projector=(32, 16)),
    TEXTS | dict(views=dict(name="ssljax.data.slip_views", size=(32, 32), scale=(0.6, 1.0))),
  ),
  "flip": (
    dict(pool="mean"),
    IMAGE_TEXT | dict(name="ssljax.methods.image_text.flip", scale=10.0),
    TEXTS | dict(hidden=dict(name="ssljax.data.masking.random", ratio=0.5)),
  ),
}  # fmt: skip


# Methods whose examples meet only in the mean of their losses.
ALONE = ("masked", "latent_prediction")
COUPLED = [
  name for name, (_, spec, _) in METHODS.items()
  if not spec["name"].endswith(ALONE) or "similarity_weight" in spec
]  # fmt: skip


def config(method: str = "mae", **changes: Any) -> dict:
  """A plain config of a tiny run on data in memory; `changes` replace top-level keys, and dicts
  among them are merged one level deep."""
  encoder, spec, data = copy.deepcopy(METHODS[method])
  source = images(64)
  if "text" in data:
    source["text"] = np.array([f"square {i % 4} of shade {i}" for i in range(64)])
  base = dict(
    seed=0,
    total_steps=6,
    batch_size=16,
    encoder=encoder if "name" in encoder else ENCODER | encoder,
    method=spec,
    data=dict(source=source, eval_train="", eval_test="") | data,
    optimizer=dict(name="ssljax.optim.adamw", clip=1.0),
    schedule=dict(name="ssljax.schedules.warmup_cosine", base=1e-2, per=0, warmup_steps=2),
    checkpoint=dict(every=2, keep=2),
    log=dict(every=1, tensorboard=False),
    eval=dict(every=0, figures=False),
  )
  for key, value in changes.items():
    merge = isinstance(value, dict) and isinstance(base.get(key), dict)
    base[key] = base[key] | value if merge else value
  return base


def images(count: int, classes: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
  """Pictures [n 32 32 3] of bright squares whose corner is the class, on noise."""
  rng = np.random.default_rng(seed)
  label = np.arange(count, dtype=np.int32) % classes
  image = rng.integers(0, 80, (count, 32, 32, 3), dtype=np.uint8)
  for picture, kind in zip(image, label):
    y, x = 16 * (kind // 2), 16 * (kind % 2)
    picture[y : y + 16, x : x + 16] += rng.integers(80, 170, 3, dtype=np.uint8)
  return {"image": image, "label": label}
