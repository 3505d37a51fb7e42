"""Adapt Segment Anything to an image domain from weak labels alone.

>>> import wesam
>>> sam, domain = wesam.load_sam("nano"), wesam.load_domain("camouflaged")
>>> wesam.keep_best(wesam.adapt(sam, domain, wesam.preset("nano")), Path("adapter"))
>>> model = wesam.AdaptedSam.load(sam, Path("adapter"))
>>> masks, iou = wesam.predict(model, image, wesam.Prompts(boxes=boxes))
"""

from wesam.adapt import Best, Report, adapt, keep_best
from wesam.adapters import AdaptedSam
from wesam.config import Config, preset
from wesam.data import Domain, load_domain
from wesam.errors import InputError
from wesam.evaluate import Scores, baseline, evaluate, predict
from wesam.overlay import overlay
from wesam.prompts import Prompts
from wesam.sam import load_sam

__version__ = "0.1.0"
__all__ = [
    "AdaptedSam",
    "Best",
    "Config",
    "Domain",
    "InputError",
    "Prompts",
    "Report",
    "Scores",
    "adapt",
    "baseline",
    "evaluate",
    "keep_best",
    "load_domain",
    "load_sam",
    "overlay",
    "predict",
    "preset",
]
