"""Medical vision-language models: image encoder, projector, mixture-of-experts language model.

The public names stand in `__init__.pyi` and load their modules on first use, so that `import
moellava` takes a moment. Its classes are registered with transformers' Auto classes all the same:
see `moellava.registration`.
"""

import lazy_loader

from moellava.registration import register_with_transformers

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_transformers()
