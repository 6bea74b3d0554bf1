"""Checkpoints by name: those that come with this package, and those on the Hugging Face hub; upload when asked."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, create_repo, get_token, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from flowmaps.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path | None:
    """Return the directory of a checkpoint of assets/: all of them in a checkout, digits in a wheel."""
    folders = [place / "assets" / name for place in (PACKAGE, PACKAGE.parent)] if re.fullmatch(r"\w+", name) else []
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def from_hub(hub_id: str, files: Sequence[str], field: str = "") -> Path:
    """Return the folder with ``files`` (patterns) of ``hub_id``, downloaded if necessary.

    Errors name the argument ``field``, if given.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except HFValidationError:
        reason = f"no directory {hub_id}, and not a hub id (owner/name) either"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        reason = f"no directory {hub_id}, and nothing of that name on the hub: {first}"
    raise UserError(reason, field=field, value=hub_id if field else None)


def check_upload(hub_id: str) -> None:
    """Refuse, before any work, a hub id that is not owner/name, and an upload without a token or offline."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", hub_id):
        raise UserError("not a hub id (owner/name)", "push_to_hub", hub_id)
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it", "push_to_hub", hub_id)
    if not get_token():
        raise UserError("there is no token to upload with: `hf auth login`", "push_to_hub", hub_id)


def to_hub(folder: Path, hub_id: str) -> str:
    """Upload ``folder`` as the model ``hub_id``, created if needed, with the user's token; return its address."""
    try:
        url = create_repo(hub_id, exist_ok=True)
        upload_folder(repo_id=hub_id, folder_path=folder, commit_message="flowmaps export")
    except HFValidationError:
        raise UserError(f"not a hub id (owner/name); {folder} is written", "push_to_hub", hub_id) from None
    except Exception as error:  # of the hub, or of whichever HTTP library it uses
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{reason}; {folder} is written, try `hf auth login`", "push_to_hub", hub_id) from None
    return str(url)
