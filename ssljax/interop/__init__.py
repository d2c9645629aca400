"""Weights in and out of the encoder: files of timm, torchvision, Transformers, the MAE release."""

from ssljax.interop import resnet as resnet
from ssljax.interop import timm as timm
from ssljax.interop import transformers as transformers
from ssljax.interop.convert import Report as Report
from ssljax.interop.convert import from_params as from_params
from ssljax.interop.convert import to_decoder as to_decoder
from ssljax.interop.convert import to_params as to_params
from ssljax.interop.files import read_metadata as read_metadata
from ssljax.interop.files import read_weights as read_weights
from ssljax.interop.files import write_weights as write_weights
from ssljax.interop.graft import graft as graft
