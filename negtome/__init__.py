"""Negative Token Merging (NegToMe, arXiv 2412.01339) for stock diffusers pipelines.

Push the features of images that are generated together apart, so that they come out more different:

    with negtome.attach(pipe, negtome.NegToMeConfig.preset("sdxl")):
        images = pipe("a photo of a dog", num_images_per_prompt=4).images
"""

from negtome.attach import Attachment as Attachment
from negtome.attach import SiteCount as SiteCount
from negtome.attach import Step as Step
from negtome.attach import attach as attach
from negtome.config import NegToMeConfig as NegToMeConfig
from negtome.merge import negative_merge as negative_merge
from negtome.reference import Reference as Reference

__version__ = "0.1.0"
