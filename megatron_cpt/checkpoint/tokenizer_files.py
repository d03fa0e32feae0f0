"""The tokenizer that goes with a checkpoint: found, recognised by its hash, copied along."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_cpt.config.manifest import MANIFEST, read_json, sha256_file
from megatron_cpt.errors import CheckpointError, TokenizerError

MODEL_FILES = ("tokenizer.model", "tokenizer.json")  # the first that is there is the tokenizer's identity
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def tokenizer_sha256(path: Path | None) -> str | None:
    """Hash of a tokenizer's model file, or of the one that a folder holds; None when there is none."""
    files = [] if path is None else [path, *(path / name for name in MODEL_FILES)]
    return next((sha256_file(file) for file in files if file.is_file()), None)


def recorded_tokenizer(model_folder: Path) -> str | None:
    """Hash of the tokenizer a model belongs to, by its manifest, else by its own files; None: not known."""
    path = model_folder / MANIFEST
    manifest = read_json(path, CheckpointError) if path.exists() else None
    recorded = manifest.get("tokenizer_sha256") if isinstance(manifest, dict) else None
    return recorded or tokenizer_sha256(model_folder)


def matching_tokenizer(model_folder: Path, recorded: str | None, given: Path | None) -> tuple[Path | None, str | None]:
    """The tokenizer folder to use for a model and its hash.

    Args:
        model_folder: the model's own folder, which may hold its tokenizer.
        recorded: the hash that the model's manifest records, if any.
        given: the folder the user named, if any.

    Raises:
        TokenizerError: the named folder holds no tokenizer, or another one than the model's.
    """
    own = recorded or tokenizer_sha256(model_folder)
    if given is None:
        return (model_folder if tokenizer_sha256(model_folder) else None), own
    found = tokenizer_sha256(given)
    if found is None:
        raise TokenizerError(
            f"{given} holds neither {MODEL_FILES[0]} nor {MODEL_FILES[1]}; give the tokenizer's folder"
        )
    if own is not None and found != own:
        raise TokenizerError(
            f"{given} is not the tokenizer of {model_folder}: its SHA-256 begins {found[:12]}, the model belongs to "
            f"{own[:12]}; give the tokenizer that the model was trained with"
        )
    return given, found


def end_tokens(folder: Path | None) -> tuple[int | None, int | None]:
    """Ids of the tokens that begin and end a text, as far as the HF files of a tokenizer state them."""
    if folder is None or not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None, None
    config = read_json(folder / "tokenizer_config.json", TokenizerError)
    tokenizer = read_json(folder / "tokenizer.json", TokenizerError)
    vocab = tokenizer.get("model", {}).get("vocab")
    ids = {**(vocab if isinstance(vocab, dict) else {})}  # a Unigram model lists (piece, score) pairs instead
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    names = [config.get(key) for key in ("bos_token", "eos_token")]
    contents = [name.get("content") if isinstance(name, dict) else name for name in names]
    return ids.get(contents[0]), ids.get(contents[1])


def copy_tokenizer(source: Path | None, destination: Path) -> None:
    """Copy a tokenizer's files, those that are there.

    Args:
        source: its folder, or its model file. What lies beside a file goes along where the file is the folder's
            tokenizer; else the file goes alone, under the name that it is looked for by.
        destination: an existing folder.
    """
    if source is not None and source.is_file():
        if tokenizer_sha256(source.parent) != sha256_file(source):
            shutil.copyfile(source, destination / MODEL_FILES[source.suffix == ".json"])
            return
        source = source.parent
    for name in MODEL_FILES + SIDE_FILES if source is not None else ():
        if (source / name).is_file():  # type: ignore[operator]
            shutil.copyfile(source / name, destination / name)  # type: ignore[operator]
