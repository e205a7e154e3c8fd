"""Negative Token Merging (NegToMe, arXiv 2412.01339) for stock diffusers pipelines.

Push the features of images that are generated together apart, so that they come out more different:

    with negtome.attach(pipe):
        images = pipe("a photo of a dog", num_images_per_prompt=4).images
"""

from negtome.attachment import Attachment, attach, detach
from negtome.config import NegToMeConfig
from negtome.merge import negative_merge
from negtome.reference import Reference
from negtome.tally import SiteCount, Step

__version__ = "0.1.0"
__all__ = ["Attachment", "NegToMeConfig", "Reference", "SiteCount", "Step", "attach", "detach", "negative_merge"]
