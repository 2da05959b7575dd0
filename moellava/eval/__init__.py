"""Evaluation: answers beside the truth, and what they score under named rules.

The public names stand in `__init__.pyi` and load on first use: scoring needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
