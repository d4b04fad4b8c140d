"""MegaLlama trains Llama-3.1-class models with tensor, pipeline, context and data parallelism."""

__version__ = "0.1.0"
