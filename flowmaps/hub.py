"""Files of a repository on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
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
