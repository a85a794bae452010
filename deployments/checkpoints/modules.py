"""The modules that make up a model of sentence-transformers, and their folders.

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
"""Modules that hold modules of their own, in several routes."""
TRANSFORMERS = ("Transformer", "CLIPModel", "MLMTransformer")
"""Modules that transformers loads, from a config and weights."""
WEIGHTED = (*TRANSFORMERS, "StaticEmbedding", "WordEmbeddings", "Dense", "LayerNorm", "CNN", "LSTM")
"""Modules that can't do without a file of weights."""
SENTENCE = "SentenceTransformer"
"""The class that reads a folder which does not name another."""
CROSS = "CrossEncoder"


@dataclass(frozen=True)
class Module:
    """One module. `type` is the name of its class, `folder` holds its files."""

    type: str
    folder: Path

    @property
    def kind(self) -> str:
        """The class without its package, which differs between versions of sentence-transformers."""
        return self.type.rpartition(".")[2]


class Settings(BaseModel):
    """What sentence-transformers reads from its own config."""

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
    """Raises CheckpointError if they have another shape."""
    path = folder / SETTINGS
    return read_as(path, Settings) if path.is_file() else Settings()


def modules(folder: Path) -> list[Module]:
    """The modules that `modules.json` lists, and those in routes; none if there is no such file.

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
        raise CheckpointError(f"{path}: `types` does not say what {min(unknown)!r} of `structure` is")
    for name, kind in routes.types.items():
        inside = _inside(module.folder, name, path)
        if inside == module.folder:
            raise CheckpointError(f"{path}: the path {name!r} is the router's own; each of its modules needs a folder")
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
    """The folders that transformers reads: the folder itself if there are no modules."""
    return _of_kinds(folder, TRANSFORMERS)


def weighted_folders(folder: Path) -> list[Path]:
    """The folders that must hold weights: the folder itself if there are no modules."""
    return _of_kinds(folder, WEIGHTED)


def _of_kinds(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    found = modules(folder)
    return list(dict.fromkeys(each.folder for each in found if each.kind in kinds)) if found else [folder]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that is read, by name. It identifies the model."""
    found = {path for part in folders(folder) for pattern in READ for path in part.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): disk_cache.digest(path) for path in sorted(found)}


def require_class(folder: Path, wanted: str) -> None:
    """Raises CheckpointError if the model needs another class of sentence-transformers than the one wanted.

    A class loads another's checkpoint from the transformer in the folder itself, without its modules. So that is no
    error if there is one.
    """
    listed = modules(folder)
    made = settings(folder).model_type
    if not listed or made == wanted or ((folder / CONFIG).is_file() and listed[0].folder == folder):
        return
    kinds = ", ".join(module.kind for module in listed)
    task = {
        SENTENCE: "an embedder; serve it with the task embedding",
        CROSS: "a reranker; serve it with the task rerank",
    }
    raise CheckpointError(
        f"{folder} has a {made} of sentence-transformers ({kinds}), not the {wanted} that this task needs: it is "
        f"{task.get(made, 'of a kind that Dure does not serve')}"
    )
