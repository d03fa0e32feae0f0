"""From text files to training samples: documents, indexed datasets, and the order they are visited in."""

from megatron_cpt.data.batches import IGNORED, Batch, Samples, ValidationWindows, batch, validation_windows
from megatron_cpt.data.build import build_dataset, verify_dataset
from megatron_cpt.data.documents import Document, is_held_out, read_documents, split_held_out, work_of
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import Place, Sample, SamplePlan

__all__ = [
    "IGNORED",
    "Batch",
    "Document",
    "IndexedDataset",
    "Place",
    "Sample",
    "SamplePlan",
    "Samples",
    "ValidationWindows",
    "batch",
    "build_dataset",
    "is_held_out",
    "read_documents",
    "split_held_out",
    "validation_windows",
    "verify_dataset",
    "work_of",
]
