"""Continue the pre-training of a Llama in another language, vocabulary included."""

__version__ = "0.1.0"
