"""Models on the Hugging Face hub: fetched into its cache, and uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError

WANTED = ("*.json", "*.safetensors")  # of a repository: what a model is made of


def download_from_hub(hub_id: str, revision: str | None = None) -> Path:
    """Fetches a model repository's configs and weights into the hub's cache; revision: a branch, tag or commit, left
    out the main branch. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(WANTED)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        of = "" if revision is None else f" in its revision {revision!r}"
        raise UserError(
            f"{hub_id!r} is neither a local folder nor a model that the hub would give{of} ({type(error).__name__}); "
            "check the path, or download the model folder and name it"
        ) from error


def upload_to_hub(
    folder: Path,
    hub_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    replaced: Sequence[str] = (),
) -> str:
    """Makes the folder's files those of a model repository, `owner/name`, in one commit, and returns its address.

    private: who sees a repository that is new, left out as the owner's settings say; token: left out, that of
    `hf auth login`; revision: the branch, made where there is none, left out the main one; replaced: patterns of the
    files there that are deleted unless the folder has them. Raises UserError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            delete_patterns=list(replaced),
        )
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the hub did not take {hub_id!r} ({type(error).__name__}: {reason}); name it owner/name, log in by "
            "`hf auth login` with a token that may write there, and check the network"
        ) from error
    return str(address)
