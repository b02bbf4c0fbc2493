# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Loads from the Hub and pushes to it with the code of this package; code in a repository is never run."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from . import loadable
from .export import push_pipeline
from .model_card import CardDetails
from .model_index import check_model_index


if TYPE_CHECKING:
    from typing_extensions import Self

_DOWNLOAD_SETTINGS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class HubPipeline(DiffusionPipeline):
    """A pipeline that loads and pushes folders in the format of `export_for_hub`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "Self":
        """As diffusers', but weights are read from safetensors alone; `use_safetensors=False` takes a .bin."""
        return super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> "dict[str, Any] | tuple":
        """Loads the configuration as diffusers does, with this package's classes instead of the repository's code.

        Raises:
            ValueError: The configuration names other classes, or the folder has code that would be run.
        """
        # Replace names of files by those of classes.
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, entry in config.items():
            is_pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
            if is_pair and name == "_class_name":
                config[name] = entry[1]
            elif is_pair and entry[1] in loadable.package_classes():
                config[name] = [loadable.__name__, entry[1]]

        # Check the rest.
        folder = args[0] if args else kwargs["pretrained_model_name_or_path"]
        required, optional = ("transformer", "scheduler"), cls._optional_components
        check_model_index(config, folder, required=required, optional=optional, own=loadable.__name__)
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads configurations and safetensors weights of one variant; components that are given are left out.

        diffusers' own method asks for `trust_remote_code` as soon as a repository holds code.
        """
        settings = {name: kwargs[name] for name in _DOWNLOAD_SETTINGS if kwargs.get(name) is not None}
        variant, given = kwargs.get("variant"), [f"{name}/*" for name in kwargs]
        download = partial(snapshot_download, pretrained_model_name, **settings)
        configs, no_variants = ["model_index.json", "*/*.json"], [*given, "*.*.safetensors"]
        if variant is None:
            return download(allow_patterns=[*configs, "*.safetensors"], ignore_patterns=no_variants)

        # As in diffusers, a component without this variant is loaded in its default one.
        wanted = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
        folder = Path(download(allow_patterns=configs + wanted, ignore_patterns=given))
        parts = {path.parent for path in folder.glob("*/config.json")}
        if lacking := parts - {path.parent for path in folder.glob("*/*.safetensors")}:
            weights = [f"{path.name}/*.safetensors" for path in lacking]
            download(allow_patterns=weights, ignore_patterns=no_variants)
        return str(folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        *,
        variant: str | None = None,
        revision: str | None = None,
        card: CardDetails | None = None,
    ) -> str:
        """Pushes the output of `export_for_hub`, which loads with this package or, with `trust_remote_code`, without.

        Args:
            repo_id: "name" or "organisation/name"; created if missing.
            commit_message: First line of the commit.
            private: Whether a new repository is private; None for the owner's default.
            token: Token for the Hub; None for that of `hf auth login` or HF_TOKEN.
            variant: Part of the weights' file names, such as "fp16".
            revision: Branch, created if missing; None for the default one.
            card: Details for the model card that the pipeline does not tell. The card in the repository is replaced.

        Returns:
            The repository's URL.

        Raises:
            ValueError: A component cannot be exported, or the Hub refuses the push.
            ConnectionError: The Hub could not be reached. Call again to continue.
        """
        return push_pipeline(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            variant=variant,
            revision=revision,
            card=card,
        )
