"""Losses as pure functions of arrays. They import jax and nothing else of this package."""

from ssljax.losses import assignment as _assignment
from ssljax.losses import centroids as _centroids
from ssljax.losses import clustering as _clustering
from ssljax.losses import coarse_labels as _coarse_labels
from ssljax.losses import columns as _columns
from ssljax.losses import contrastive as _contrastive
from ssljax.losses import dense as _dense
from ssljax.losses import distillation as _distillation
from ssljax.losses import feature_distillation as _feature_distillation
from ssljax.losses import gaussian as _gaussian
from ssljax.losses import image_text as _image_text
from ssljax.losses import labelled as _labelled
from ssljax.losses import masked as _masked
from ssljax.losses import masked_tokens as _masked_tokens
from ssljax.losses import memberships as _memberships
from ssljax.losses import pretext as _pretext
from ssljax.losses import queues as _queues
from ssljax.losses import redundancy as _redundancy
from ssljax.losses import relations as _relations
from ssljax.losses import scores as _scores
from ssljax.losses import spectral as _spectral
from ssljax.losses import spread as _spread
from ssljax.losses import tiled as _tiled
from ssljax.losses import whitening as _whitening
from ssljax.losses.assignment import *  # noqa: F403
from ssljax.losses.centroids import *  # noqa: F403
from ssljax.losses.clustering import *  # noqa: F403
from ssljax.losses.coarse_labels import *  # noqa: F403
from ssljax.losses.columns import *  # noqa: F403
from ssljax.losses.contrastive import *  # noqa: F403
from ssljax.losses.dense import *  # noqa: F403
from ssljax.losses.distillation import *  # noqa: F403
from ssljax.losses.feature_distillation import *  # noqa: F403
from ssljax.losses.gaussian import *  # noqa: F403
from ssljax.losses.image_text import *  # noqa: F403
from ssljax.losses.labelled import *  # noqa: F403
from ssljax.losses.masked import *  # noqa: F403
from ssljax.losses.masked_tokens import *  # noqa: F403
from ssljax.losses.memberships import *  # noqa: F403
from ssljax.losses.pretext import *  # noqa: F403
from ssljax.losses.queues import *  # noqa: F403
from ssljax.losses.redundancy import *  # noqa: F403
from ssljax.losses.relations import *  # noqa: F403
from ssljax.losses.scores import *  # noqa: F403
from ssljax.losses.spectral import *  # noqa: F403
from ssljax.losses.spread import *  # noqa: F403
from ssljax.losses.tiled import *  # noqa: F403
from ssljax.losses.whitening import *  # noqa: F403

__all__ = sorted(
  name
  for family in (
    _assignment,
    _centroids,
    _clustering,
    _coarse_labels,
    _columns,
    _contrastive,
    _dense,
    _distillation,
    _feature_distillation,
    _gaussian,
    _image_text,
    _labelled,
    _masked,
    _masked_tokens,
    _memberships,
    _pretext,
    _queues,
    _redundancy,
    _relations,
    _scores,
    _spectral,
    _spread,
    _tiled,
    _whitening,
  )
  for name in family.__all__
)
