"""From text files to training samples: documents, indexed datasets, and the order they are visited in."""

from megatron_cpt.data.documents import Document, is_held_out, read_documents, split_held_out, work_of

__all__ = ["Document", "is_held_out", "read_documents", "split_held_out", "work_of"]
