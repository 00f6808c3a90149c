"""The reference mixture-of-experts model: one configuration, one model per framework (`muonclip.models.torch`).

Importing this package imports no framework.
"""

from muonclip.models.config import MoEConfig

__all__ = ["MoEConfig"]
