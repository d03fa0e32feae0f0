"""`run`: the steps of a recipe in order, each done once."""

from megatron_cpt.pipeline.run import run

__all__ = ["run"]
