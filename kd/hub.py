"""The Hugging Face Hub's two questions that need care: is it there, and where does a finished folder go."""

import os
import threading
import urllib.error
import urllib.request

import huggingface_hub
from huggingface_hub import constants


def reachable(timeout: float = 8.0) -> bool:
    """Whether the Hub (or `HF_ENDPOINT`) answers within `timeout` seconds.

    Asked once, before any download: the client itself retries an unreachable Hub for most of a minute. Where the
    answer is no, the client is switched to offline mode, so that what is already in its cache still loads.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # it answered, if only to say no
        except (OSError, ValueError):
            pass

    # in a thread, because the look-up of a name does not heed the timeout
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    if not answered.is_set():
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads the environment when it is imported
    return answered.is_set()


def push_folder(folder: str, repo: str, message: str, private: bool = False) -> str:
    """Upload a saved folder to the Hub's `repo` (made if need be); returns one line that says how it went.

    An upload that fails must never harm the run whose result it carries, so every failure becomes that line.
    """
    try:
        if not reachable():
            return f"not pushed: the Hub at {constants.ENDPOINT} cannot be reached; {folder} is complete"
        api = huggingface_hub.HfApi()
        repo_id = api.create_repo(repo, exist_ok=True, private=private).repo_id
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message)
        return f"pushed {folder} to {constants.ENDPOINT}/{repo_id}"
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        if huggingface_hub.get_token() is None:
            return f"not pushed: no login; run `hf auth login` or set HF_TOKEN, then push {folder}"
        return f"not pushed: {str(error).splitlines()[0]}; {folder} is complete"
