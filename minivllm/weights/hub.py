"""Models from the Hugging Face hub: the files that are needed, and errors that say what to do.

``huggingface_hub`` keeps the cache, shows the progress bars, and reads HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

from pathlib import Path

from minivllm.errors import ModelLoadError
from minivllm.weights.checkpoint import INDEX_FILE, PICKLE_SUFFIXES, read_index

_CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]


def download_config(repo_id: str, revision: str | None) -> Path:
    """Fetch everything but the weights into the cache, and return the snapshot's folder.

    Raises:
        ModelLoadError: no such model or revision, no permission, no network and not in the cache.
    """
    return _snapshot(repo_id, revision, allow=_CONFIG_FILES)


def download_weights(repo_id: str, snapshot: Path) -> Path:
    """Fetch the safetensors that belong to the snapshot of :func:`download_config`; return its folder.

    That is what its index names. Without one it is the top level's files, but for the
    ``consolidated`` copy that some repositories keep in their authors' own format.

    Raises:
        ModelLoadError: as :func:`download_config`.
    """
    index = read_index(snapshot)
    commit = snapshot.name  # the very commit whose configuration was read, even if the branch has moved
    if index is not None:
        return _snapshot(repo_id, commit, allow=sorted(set(index.values())))
    folder = _snapshot(repo_id, commit, allow=["*.safetensors"], ignore=["*/*", "consolidated*"])
    if not any(file.suffix in (".safetensors", *PICKLE_SUFFIXES) for file in folder.iterdir()):
        _check_that_there_are_none(repo_id, commit)
    return folder


def _check_that_there_are_none(repo_id: str, commit: str) -> None:
    """Ask the hub whether a snapshot without weights is all that there is.

    Without a network, its library hands out what it has of a model, complete or not.
    """
    from huggingface_hub import list_repo_files

    try:
        list_repo_files(repo_id, revision=commit)
    except Exception as error:  # of many kinds, as below
        raise _incomplete(repo_id, f"{type(error).__name__}: {error}") from None


def _snapshot(repo_id: str, revision: str | None, allow: list[str], ignore: list[str] | None = None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    what = repo_id if revision is None else f"{repo_id} (revision {revision})"
    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
    except errors.GatedRepoError:
        raise ModelLoadError(
            f"{repo_id} is gated: accept its licence on {page}, then log in with `hf auth login` "
            "or set HF_TOKEN to an access token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelLoadError(
            f"{repo_id} is neither a folder here nor a model on the Hugging Face hub; if {page} is private, "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelLoadError(f"{repo_id} has no revision {revision}: see {page}/tree/main") from None
    except errors.LocalEntryNotFoundError as error:
        raise _incomplete(what, str(error.__cause__ or error)) from None
    except errors.HFValidationError as error:
        raise ModelLoadError(f"{repo_id} is no Hugging Face id: {error}") from None
    except Exception as error:  # the HTTP client's own, a full disk: of many kinds, and all mean the same
        raise ModelLoadError(f"{what} couldn't be fetched: {type(error).__name__}: {error}") from error
    return Path(folder)


def _incomplete(what: str, reason: str) -> ModelLoadError:
    from huggingface_hub import constants

    cache = f"{what} isn't complete in the cache, {constants.HF_HUB_CACHE}, and"
    if constants.HF_HUB_OFFLINE:
        return ModelLoadError(
            f"{cache} HF_HUB_OFFLINE is set: unset it, or fetch the model where there is a network and copy "
            "the cache"
        )
    return ModelLoadError(f"{cache} {constants.ENDPOINT} can't be reached: {reason}")
