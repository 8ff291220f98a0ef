"""Models at URIs: found in their store by the driver, brought into each node's cache by the processes that read them.

A config keeps the URI, also where a name of a model is written; `strategies.models.location` knows this process's copy. What a
driver has found (names, sizes and versions of files) travels with its jobs, so that all processes read the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pyarrow import fs

from cluster.config import ClusterKeys, RayConfig
from pipeline.errors import UserError
from pipeline.io.cache import Item, NodeCache
from pipeline.io.first_answer import check_answer
from pipeline.io.retry import STORAGE_ERRORS, waiting_for
from pipeline.io.storage import Folder, reason
from pipeline.io.stored_weights import WEIGHTS, check_whole, missing_shards
from pipeline.secrets import redact_text
from strategies.models.location import ADAPTER_CONFIG, is_remote, model_values, resolve_model_location, use_copy

if TYPE_CHECKING:
    from strategies.config import StrategyConfig

__all__ = ["RemoteModel", "RemoteModels", "bring_remote", "bring_weights", "check_remote", "fetch_models", "find_models"]

CONFIG = "config.json"
WHOLE = (CONFIG, ADAPTER_CONFIG)
NEEDED = {"lora_model_dir": (ADAPTER_CONFIG,), "base_model_config": (CONFIG,), "tokenizer_config": ()}
"""Key -> files of which a folder must have one; `WHOLE` for other keys."""
NO_MODELS = ("base_model_config", "tokenizer_config")
"""Keys of folders that need no weights."""
FOREIGN = (".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".ot", ".pth", ".tflite")
"""Endings of what `from_pretrained` doesn't read from a folder."""
NESTED = (".jinja", ".json", ".model", ".py", ".txt")
"""Endings of what is read from a model's inner folders; weights there are others, such as those of checkpoints."""
VERSIONS = ("etag", "sha", "blob_id", "checksum", "content_md5", "generation", "last_modified", "lastmodified", "created")
"""What fsspec's filesystems report of a file that changes with its content, in lower case."""
CHUNK = 16 << 20
AT_ONCE = 8
"""Files that are read at once."""
_FOUND: dict[str, RemoteModel] = {}
"""URI -> what this process has found there last."""


@dataclass(frozen=True)
class StoredFile:
    """A file in a store."""

    name: str
    """Path in the model's folder."""
    size: int
    version: str
    """The store's ETag; the time of the last change, or the content's hash, where it has none."""


@dataclass(frozen=True)
class RemoteModel:
    """A folder or a file at a URI, as it was found."""

    uri: str
    folder: Folder
    files: tuple[StoredFile, ...]
    is_file: bool
    weights: bool = False
    """Whether its weights are read, not only config, tokenizer and processor."""

    def bring(self, cache: NodeCache, beat: Callable[[], None]) -> None:
        """Let this process read the model from the node's cache, and fill that if needed. Raises as `RemoteModels.bring`."""
        files = tuple(file for file in self.files if self.weights or self.is_file or not file.name.endswith(WEIGHTS))
        # In a folder of the model's name, since libraries call a model by its last folder.
        base, *query = self.uri.partition("?")
        name = PurePosixPath(base).name
        # A slash at the end changes nothing.
        content = json.dumps(["".join([base.rstrip("/"), *query]), [[file.name, file.size, file.version] for file in files]])
        item = Item(
            key=f"model-{hashlib.sha256(content.encode()).hexdigest()[:20]}",
            what=f"the files of {self.uri}",
            size=lambda: sum(file.size for file in files),
            fill=lambda entry: self._copy(files, entry if self.is_file else entry / name, beat),
        )
        use_copy(self.uri, cache.get(item, beat) / name)

    def problem(self) -> str | None:
        """Return why this process can't read the model, or None."""
        try:
            changed = _stored(self.folder, self.files[0].name) != self.files[0]
        except STORAGE_ERRORS as error:
            return reason(error)
        return "it has changed meanwhile" if changed else None

    def _copy(self, files: tuple[StoredFile, ...], target: Path, beat: Callable[[], None]) -> None:
        with waiting_for(f"the files of {self.uri}"), ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda file: self._copy_file(file, target / file.name, beat), files):
                pass

    def _copy_file(self, file: StoredFile, target: Path, beat: Callable[[], None]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            for chunk in self._read(file):
                copy.write(chunk)
                beat()

    def _read(self, file: StoredFile) -> Iterator[bytes]:
        """Yield a file's bytes. Raises UserError when it isn't, or is no longer, what was found."""
        path, left = f"{self.folder.path}/{file.name}", file.size
        try:
            with self.folder.filesystem.open_input_stream(path) as stream:
                while chunk := stream.read(CHUNK):
                    left -= len(chunk)
                    yield chunk
            # After the last byte: each chunk is a request of its own, and the file may have been replaced between two.
            changed = left != 0 or _stored(self.folder, file.name).version != file.version
        except STORAGE_ERRORS as error:
            raise UserError(f"{self.uri} can't be read: {file.name}: {reason(error)}") from error
        if changed:
            raise UserError(f"{self.uri} has changed since it was looked at: {file.name} is another; start again")


@dataclass(frozen=True)
class RemoteModels:
    """The models at URIs that a job reads, with the keys of their stores."""

    models: tuple[RemoteModel, ...] = ()
    cache: RayConfig = field(default_factory=RayConfig)
    """`ray:` of the recipe, which says where nodes have their cache."""

    def bring(self, beat: Callable[[], None] = lambda: None) -> None:
        """Let this process read the models, from the cache of its node.

        Args:
            beat: called again and again meanwhile.

        Raises:
            UserError: when a store can't be read, a model isn't what the driver found, or the cache can't hold it.
        """
        for model in self.models:
            model.bring(NodeCache.of(self.cache), beat)


def fetch_models(*cfgs: StrategyConfig) -> None:
    """Look at the models at URIs that configs name, check them, and let this process read all of them but their weights.

    Raises:
        UserError: naming the key, when there is no model at a URI, it is incomplete, or can't be read; as `RemoteModels.bring`.
    """
    for cfg in cfgs:
        for key, uri in _at_uris(cfg):
            _FOUND[uri] = _look(key, uri, cfg)
        _bring(cfg, [_FOUND[uri] for _, uri in _at_uris(cfg)])


def bring_remote(what: str, uri: str, cfg: StrategyConfig | None) -> Path:
    """Bring what is at a URI, weights too, and return its folder on this machine. Raises as `fetch_models`."""
    _bring(cfg, [replace(_look(what, uri), weights=True)])
    return Path(resolve_model_location(uri, what).path)


def check_remote(what: str, uri: str) -> None:
    """Check that a whole model is at a URI. Raises UserError that begins with `what`."""
    _look(what, uri)


def bring_weights(cfg: StrategyConfig, keys: Iterable[str]) -> None:
    """Let this process read the weights at the URIs of some keys, as it has found them last. Raises as `fetch_models`."""
    wanted = [(key, uri) for key, uri in _at_uris(cfg) if key in keys]
    _bring(cfg, [replace(_found(key, uri, cfg), weights=True) for key, uri in wanted])


def find_models(*cfgs: StrategyConfig, without: Iterable[str] = ()) -> RemoteModels:
    """Return the models at URIs as this process has found them last, for a job.

    Args:
        cfgs: recipes of the job.
        without: keys whose weights the job doesn't read.

    Raises:
        UserError: as `fetch_models`.
    """
    models: dict[str, RemoteModel] = {}
    for cfg in cfgs:
        for key, uri in _at_uris(cfg):
            model = models.get(uri) or _found(key, uri, cfg)
            has_weights = model.weights or key not in (*without, *NO_MODELS)
            models[uri] = replace(model, folder=model.folder.carried(), weights=has_weights)
    return RemoteModels(tuple(models.values()), next(map(_cache, cfgs), RayConfig()))


def _bring(cfg: StrategyConfig | None, models: Iterable[RemoteModel]) -> None:
    RemoteModels(tuple(models), _cache(cfg)).bring()


def _found(key: str, uri: str, cfg: StrategyConfig) -> RemoteModel:
    if uri not in _FOUND:
        _FOUND[uri] = _look(key, uri, cfg)
    return _FOUND[uri]


def _cache(cfg: StrategyConfig | None) -> RayConfig:
    # A config of `strategies` alone has no section of Ray's.
    return cfg.ray if isinstance(cfg, ClusterKeys) else RayConfig()


def _at_uris(cfg: StrategyConfig) -> list[tuple[str, str]]:
    return [(key, value) for key, value in model_values(cfg) if is_remote(value)]


def _look(key: str, uri: str, cfg: StrategyConfig | None = None) -> RemoteModel:
    """List a model's files, and check that they are a whole model."""
    if (shown := redact_text(uri)) != uri:
        raise UserError(
            f"{key}: {shown!r} has keys in it, which would be saved wherever the model is named; set them in the environment"
        )
    subfolder = None if cfg is None else (cfg.overrides_of_model_kwargs or {}).get("subfolder")
    try:
        folder, names, is_file = _list(key, uri, subfolder)
        _check_names(key, uri, names, is_file)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            files = tuple(pool.map(partial(_stored, folder), names))
        _check_files(key, uri, folder, files)
    except STORAGE_ERRORS as error:
        raise UserError(f"{key}: {uri!r} can't be read: {reason(error)}") from error
    return RemoteModel(uri, folder, files, is_file)


def _list(key: str, uri: str, subfolder: str | None) -> tuple[Folder, list[str], bool]:
    """Return the folder at a URI and the names of a model's files in it; for a file its folder, its name, and True."""
    try:
        folder = Folder(uri)
    except UserError as error:  # a scheme without a filesystem
        raise UserError(f"{key}: {error}") from error
    check_answer(uri, folder.filesystem, folder.path)
    if folder.filesystem.get_file_info(folder.path).type == fs.FileType.File:
        base, mark, query = uri.partition("?")
        parent, _, name = base.rpartition("/")
        return Folder(f"{parent}{mark}{query}"), [name], True
    selector = fs.FileSelector(folder.path, allow_not_found=True, recursive=True)
    infos = [info for info in folder.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    names = [info.path.removeprefix(f"{folder.path}/") for info in infos]
    return folder, sorted(name for name in names if _is_read(name, subfolder)), False


def _is_read(name: str, subfolder: str | None) -> bool:
    """Return whether loading a model may read a file of its folder."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or path.suffix in FOREIGN:
        return False
    is_top = len(path.parts) == 1 or (subfolder is not None and path.is_relative_to(subfolder))
    return is_top or path.suffix in NESTED


def _check_names(key: str, uri: str, names: list[str], is_file: bool) -> None:
    if is_file and not names[0].endswith((".gguf", ".json")):
        raise UserError(f"{key}: {uri!r} is a file; give the folder of a model, or a .gguf file")
    if not names:
        raise UserError(f"{key}: there is no model at {uri!r}: no such bucket, or nothing under that name")
    needed = NEEDED.get(key, WHOLE)
    if not is_file and needed and not set(needed) & set(names):
        has = f"it has {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        raise UserError(f"{key}: {uri!r} holds no {' or '.join(needed)}; {has}")
    if key not in NO_MODELS and not any(name.endswith(WEIGHTS) for name in names):
        raise UserError(f"{key}: {uri!r} holds a model's config and no weights (*.safetensors or *.bin)")


def _check_files(key: str, uri: str, folder: Folder, files: tuple[StoredFile, ...]) -> None:
    """Raise UserError for weights that are missing or cut short, which would otherwise fail in every worker."""
    sizes = {file.name: file.size for file in files}
    if missing := missing_shards(folder, sizes):
        raise UserError(f"{key}: {uri!r} lacks {len(missing)} files that its index names, such as {missing[0]}")
    weights = [file for file in files if file.name.endswith(WEIGHTS)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda file: check_whole(folder, file.name, file.size), weights)
        if damage := next(filter(None, found), None):
            raise UserError(f"{key}: {uri!r} is damaged: {damage}; upload it again")


def _stored(folder: Folder, name: str) -> StoredFile:
    """Look at a file in its store. Raises OSError."""
    path = f"{folder.path}/{name}"
    with folder.filesystem.open_input_file(path) as file:
        tag = {key.lower(): value for key, value in file.metadata().items()}.get("etag")
        size = file.size()
    # Asked for only where needed: a request more for each file.
    return StoredFile(name, size, tag.decode() if tag else _version(folder.filesystem, path))


def _version(filesystem: fs.FileSystem, path: str) -> str:
    """Return what changes with a file of a store that pyarrow finds no ETag in; its SHA-256 where there is nothing else."""
    if (written := filesystem.get_file_info(path).mtime_ns) is not None:
        return str(written)
    if isinstance(filesystem, fs.PyFileSystem):
        details = filesystem.handler.fs.info(path)
        if given := {name: str(value) for name, value in details.items() if name.lower() in VERSIONS and value}:
            return json.dumps(given, sort_keys=True)
    with filesystem.open_input_stream(path) as stream:
        content = hashlib.sha256()
        while chunk := stream.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()
