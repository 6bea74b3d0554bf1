"""Files of a repository on the Hugging Face hub: down, and up when asked."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from flowmaps.errors import UserError


def from_hub(hub_id: str, files: Sequence[str], what: str = "") -> Path:
    """The folder with ``files`` (patterns) of ``hub_id``, downloaded if need be; ``what`` begins error messages."""
    begin = f"{what}={hub_id}: " if what else ""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except HFValidationError:
        raise UserError(f"{begin}no directory {hub_id}, and not a hub id (owner/name) either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{begin}no directory {hub_id}, and the hub gave none of that name: {reason}") from None


def to_hub(folder: Path, hub_id: str) -> str:
    """Upload ``folder`` as the model ``hub_id``, made if it is not there, by the user's token; returns its address."""
    try:
        url = create_repo(hub_id, exist_ok=True)
        upload_folder(repo_id=hub_id, folder_path=folder, commit_message="flowmaps export")
    except HFValidationError:
        raise UserError(f"--push_to_hub={hub_id} is no hub id (owner/name); {folder} is written") from None
    except Exception as error:  # of the hub, or of whichever HTTP library it uses
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--push_to_hub={hub_id}: {reason}; {folder} is written, try `hf auth login`") from None
    return str(url)
