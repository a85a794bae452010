"""The modules that make up a sentence-transformers model, and their folders.

https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, PositiveInt

from deployments import disk_cache
from deployments.checkpoints.files import CONFIG, MODULES, READ, ROUTES, SETTINGS, read_as
from deployments.spec import CheckpointError

ROUTERS = ("Router", "Asym")
"""Modules that hold other modules, in several routes."""
TRANSFORMERS = ("Transformer", "CLIPModel", "MLMTransformer")
"""Modules that the transformers library loads, from a config and weights."""
WEIGHTED = (*TRANSFORMERS, "StaticEmbedding", "WordEmbeddings", "Dense", "LayerNorm", "CNN", "LSTM")
"""Modules that need a weights file."""
SENTENCE = "SentenceTransformer"
"""The sentence-transformers class of embedders, assumed for a folder that names none."""
CROSS = "CrossEncoder"
"""The sentence-transformers class of rerankers."""


@dataclass(frozen=True)
class Module:
    """One module. `type` is the name of its class, `folder` holds its files."""

    type: str
    folder: Path

    @property
    def kind(self) -> str:
        """The class's name without its package, which differs between versions of sentence-transformers."""
        return self.type.rpartition(".")[2]


class Settings(BaseModel):
    """Settings that sentence-transformers saves with a model."""

    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None
    model_type: str = SENTENCE
    truncate_dim: PositiveInt | None = None


class _Listed(BaseModel):
    name: str | int
    type: str
    path: str


class _Routes(BaseModel):
    types: dict[str, str]
    structure: dict[str, list[str]]


def settings(folder: Path) -> Settings:
    """The folder's settings, or the defaults. Raises CheckpointError if the file does not hold valid settings."""
    path = folder / SETTINGS
    return read_as(path, Settings) if path.is_file() else Settings()


def modules(folder: Path) -> list[Module]:
    """The modules that `modules.json` lists, each followed by those in its routes; none if there is no such file.

    Raises CheckpointError if the list is empty or damaged, or leads out of the folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    listed = read_as(path, list[_Listed])
    if not listed:
        raise CheckpointError(f"{path} lists no modules; save the model again, or remove the file to use the defaults")
    return [module for each in listed for module in _with_routes(Module(each.type, _inside(folder, each.path, path)))]


def _with_routes(module: Module) -> Iterator[Module]:
    yield module
    if module.kind not in ROUTERS:
        return
    path = next((module.folder / name for name in (ROUTES, CONFIG) if (module.folder / name).is_file()), None)
    if path is None:
        return
    routes = read_as(path, _Routes)
    if unknown := {name for names in routes.structure.values() for name in names} - set(routes.types):
        raise CheckpointError(f"{path}: `structure` names {min(unknown)!r}, which `types` lacks")
    for name, kind in routes.types.items():
        inside = _inside(module.folder, name, path)
        if inside == module.folder:
            raise CheckpointError(f"{path}: the path {name!r} is the router's own; give each of its modules a folder")
        yield from _with_routes(Module(kind, inside))


def _inside(folder: Path, named: str, where: Path) -> Path:
    path = PurePosixPath(named)
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(f"{where}: the path {named!r} leads out of the folder")
    return folder / path


def folders(folder: Path) -> list[Path]:
    """The folder itself and the folders of all modules."""
    return list(dict.fromkeys([folder, *(module.folder for module in modules(folder))]))


def transformer_folders(folder: Path) -> list[Path]:
    """The folders that the transformers library reads: the folder itself if no modules are listed."""
    return _of_kinds(folder, TRANSFORMERS)


def weighted_folders(folder: Path) -> list[Path]:
    """The folders that must hold weights: the folder itself if no modules are listed."""
    return _of_kinds(folder, WEIGHTED)


def _of_kinds(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    found = modules(folder)
    return list(dict.fromkeys(each.folder for each in found if each.kind in kinds)) if found else [folder]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that is read, by path. Together they identify the model. `folder` may be a GGUF file."""
    if folder.is_file():
        return {folder.name: disk_cache.digest(folder)}
    found = {path for part in folders(folder) for pattern in READ for path in part.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): disk_cache.digest(path) for path in sorted(found)}


def require_class(folder: Path, wanted: str) -> None:
    """Raises CheckpointError if the model was saved by another sentence-transformers class than the one wanted.

    That is no error if the folder itself holds the transformer: each class then loads it and ignores the other's
    modules.
    """
    listed = modules(folder)
    saved_by = settings(folder).model_type
    if not listed or saved_by == wanted or ((folder / CONFIG).is_file() and listed[0].folder == folder):
        return
    kinds = ", ".join(module.kind for module in listed)
    task = {
        SENTENCE: "an embedder; serve it with the task embedding",
        CROSS: "a reranker; serve it with the task rerank",
    }
    raise CheckpointError(
        f"{folder} holds a sentence-transformers {saved_by} ({kinds}), not the {wanted} that this task needs: it is "
        f"{task.get(saved_by, 'of a kind that Dure does not serve')}"
    )
