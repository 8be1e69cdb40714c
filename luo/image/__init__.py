"""Images: handovers on disk, to look into, check, compare, convert and make by hand.

::

    image = Image.load("cloud.khoimg")       # or a dump directory
    image.survey.violations                  # every rule that it breaks
    kho = Kho.boot(image.memory(), image.handover, abi=image.abi)

:mod:`~luo.image.store` is the file, :mod:`~luo.image.survey` reads what is in it without trusting
any of it. Reading never writes, and never follows an address before looking at it.
"""

from luo.image.store import Extent, Image, Ram
from luo.image.survey import MapPage, Subtree, Survey, Violation

__all__ = ["Extent", "Image", "MapPage", "Ram", "Subtree", "Survey", "Violation"]
