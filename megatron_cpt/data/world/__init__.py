"""A small invented world told in English and Japanese: the project's own text, without end and from a seed."""

from megatron_cpt.data.world.generator import ProbeItem, World
from megatron_cpt.data.world.writing import text_hash, write_world

__all__ = ["ProbeItem", "World", "text_hash", "write_world"]
