"""The tokenizer that goes with a checkpoint: found, recognised by its hash, copied along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.files import brief, file_inside, json_inside
from megatron_cpt.config.manifest import MANIFEST, read_json, sha256_file
from megatron_cpt.errors import CheckpointError, TokenizerError

MODEL_FILES = ("tokenizer.model", "tokenizer.json")  # the first that is there is the tokenizer's identity
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def tokenizer_sha256(path: Path | None) -> str | None:
    """Hash of a tokenizer's model file, or of the one that a folder holds; None when there is none.

    Raises:
        CheckpointError: that of the folder is a link out of it, or no regular file.
    """
    if path is None or path.is_file():
        return None if path is None else sha256_file(path)
    return next((sha256_file(file) for name in MODEL_FILES if (file := _held(path, name)) is not None), None)


def _held(folder: Path, name: str) -> Path | None:
    """A file of a tokenizer's folder, which may be a stranger's checkpoint; None where it is not there."""
    return file_inside(folder, name) if (folder / name).exists() else None


def recorded_tokenizer(model_folder: Path) -> str | None:
    """Hash of the tokenizer a model belongs to, by its manifest, else by its own files; None: not known."""
    path = model_folder / MANIFEST
    manifest = read_json(json_inside(model_folder, MANIFEST), CheckpointError) if path.exists() else None
    recorded = manifest.get("tokenizer_sha256") if isinstance(manifest, dict) else None
    if not isinstance(recorded, (str, type(None))):
        raise CheckpointError(f"{path}: got tokenizer_sha256 {brief(recorded)}, expected 64 hexadecimal digits")
    return recorded or tokenizer_sha256(model_folder)


def matching_tokenizer(model_folder: Path, recorded: str | None, given: Path | None) -> tuple[Path | None, str | None]:
    """The tokenizer folder to use for a model and its hash.

    Args:
        model_folder: the model's own folder, which may hold its tokenizer.
        recorded: the hash that the model's manifest records, if any.
        given: the folder the user named, if any.

    Raises:
        TokenizerError: the named folder holds no tokenizer, or another one than the model's; or the model's own
            folder holds another than its manifest records.
    """
    held = tokenizer_sha256(model_folder)
    own = recorded or held
    if given is None:
        if recorded is not None and held not in (None, recorded):
            raise TokenizerError(
                f"the tokenizer in {model_folder} was changed: its SHA-256 is not the {recorded[:12]}... that "
                f"the manifest records; restore it, or give the tokenizer that the model was trained with"
            )
        return (None if held is None else model_folder), own
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
    if folder is None or not all((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None, None
    config, tokenizer = (_object(folder, name) for name in ("tokenizer_config.json", "tokenizer.json"))
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = {**(vocab if isinstance(vocab, dict) else {})}  # a Unigram model lists (piece, score) pairs instead
    added = tokenizer.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise TokenizerError(f"{folder / 'tokenizer.json'}: added_tokens holds {brief(token)}, expected a token")
        ids[token["content"]] = token.get("id")
    names = [config.get(key) for key in ("bos_token", "eos_token")]
    contents = [name.get("content") if isinstance(name, dict) else name for name in names]
    found = [ids.get(content) if isinstance(content, str) else None for content in contents]
    if not all(number is None or type(number) is int for number in found):
        raise TokenizerError(f"{folder / 'tokenizer.json'}: the id of a token is no integer; get the tokenizer again")
    return found[0], found[1]


def _object(folder: Path, name: str) -> dict[str, Any]:
    value = read_json(json_inside(folder, name), TokenizerError)
    if not isinstance(value, dict):
        raise TokenizerError(f"{folder / name} holds {type(value).__name__}, expected an object")
    return value


def copy_tokenizer(source: Path | None, destination: Path) -> None:
    """Copy a tokenizer's files, those that are there.

    Args:
        source: its folder, or its model file. What lies beside a file goes along where the file is the folder's
            tokenizer; else the file goes alone, under the name that it is looked for by.
        destination: an existing folder.

    Raises:
        CheckpointError: a file of the folder is a link out of it, or no regular file.
    """
    if source is not None and source.is_file():
        if not _is_of_its_folder(source):
            shutil.copyfile(source, destination / MODEL_FILES[source.suffix == ".json"])
            return
        source = source.parent
    for name in MODEL_FILES + SIDE_FILES if source is not None else ():
        if (file := _held(source, name)) is not None:  # type: ignore[arg-type]
            shutil.copyfile(file, destination / name)


def _is_of_its_folder(file: Path) -> bool:
    """Whether a model file that was given is its folder's tokenizer."""
    try:
        return tokenizer_sha256(file.parent) == sha256_file(file)
    except CheckpointError:  # a link, which the user may give and a folder may not hold
        return False
