"""torch as the comparisons need it: two threads, and torchvision's missing operator."""

import importlib.util
import warnings

if importlib.util.find_spec("torch"):
  import torch

  torch.set_num_threads(2)
  if importlib.util.find_spec("torchvision"):
    # torchvision's published builds look for an operator that the CPU build of torch does not have;
    # transformers imports torchvision wherever it is installed.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      import torchvision  # noqa: F401
