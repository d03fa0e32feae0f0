"""From text files to training samples: documents, indexed datasets, and the order they are visited in."""

from megatron_cpt.data.batches import Batch, batch, scored_bytes, validation_batch
from megatron_cpt.data.build import DatasetBuild, build_files
from megatron_cpt.data.build_memory import build_dataset
from megatron_cpt.data.calibration import CalibrationText, token_counts
from megatron_cpt.data.describe import describe, describe_document, describe_sample, tokenizer_of
from megatron_cpt.data.documents import Document, is_held_out, read_documents, split_held_out, work_of
from megatron_cpt.data.indexed import IndexedDataset, manifest_path
from megatron_cpt.data.loader import Loader
from megatron_cpt.data.packing import is_packed, pack_dataset
from megatron_cpt.data.remap import remap_dataset
from megatron_cpt.data.sampler import SamplePlan, Source, open_plan
from megatron_cpt.data.stages import Place
from megatron_cpt.data.verify import trace_document, verify_dataset
from megatron_cpt.data.windows import IGNORED, Sample, Window, Windows, open_windows
from megatron_cpt.data.writing import check_no_dataset

__all__ = [
    "Batch",
    "CalibrationText",
    "DatasetBuild",
    "Document",
    "IGNORED",
    "IndexedDataset",
    "Loader",
    "Place",
    "Sample",
    "SamplePlan",
    "Source",
    "Window",
    "Windows",
    "batch",
    "build_dataset",
    "build_files",
    "check_no_dataset",
    "describe",
    "describe_document",
    "describe_sample",
    "is_held_out",
    "is_packed",
    "manifest_path",
    "open_plan",
    "open_windows",
    "pack_dataset",
    "read_documents",
    "remap_dataset",
    "scored_bytes",
    "split_held_out",
    "token_counts",
    "tokenizer_of",
    "trace_document",
    "validation_batch",
    "verify_dataset",
    "work_of",
]
