"""Medical vision-language models: an image encoder, a projector and a mixture-of-experts language model."""

__version__ = "0.1.0"
