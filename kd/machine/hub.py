"""The Hugging Face Hub's two questions that need care: is it there, and where does a finished folder go."""

import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Callable

import huggingface_hub
from huggingface_hub import constants, utils

from kd import BadInput

PATIENCE = 600.0  # seconds for an upload: the client itself would wait for a silent server for ever


def reachable(timeout: float = 8.0) -> bool:
    """Whether the Hub (or `HF_ENDPOINT`) answers within `timeout` seconds.

    Asked once, before any download: the client itself retries an unreachable Hub for most of a minute. Where the
    answer is no, the client is switched to offline mode, so that what is already in its cache still loads.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if not _answers(timeout):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads the environment when it is imported
        return False
    return True


def _answers(timeout: float) -> bool:
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
    return answered.is_set()


def check(repo: str) -> None:
    """Raise BadInput for a `--push-to-hub` that names no repository: ask early, not after hours of training."""
    if not repo:
        return
    if re.search(r"hf_\w{20}", repo):  # it would be written to config.json; so it is not repeated here either
        raise BadInput("--push-to-hub: that is an access token; give the repository, such as someone/student, and the "
                       "token to `hf auth login` or in HF_TOKEN")
    try:
        utils.validate_repo_id(repo)
    except ValueError as error:
        raise BadInput(f"--push-to-hub {repo}: names no repository; give one such as someone/student") from error


def push_folder(folder: str, repo: str, message: str, private: bool = False,
                stopped: Callable[[], Any] = lambda: False) -> str:
    """Upload a saved folder to the Hub's `repo` (made if need be); returns one line that says how it went.

    An upload that fails must never harm the run whose result it carries, so every failure becomes that line, and so
    does an upload that has not ended after PATIENCE seconds, or when `stopped` says so.
    """
    if constants.HF_HUB_OFFLINE or not _answers(8.0):
        return f"not pushed: the Hub at {constants.ENDPOINT} cannot be reached; {folder} is complete"
    said = [f"not pushed: the Hub did not take it within {PATIENCE:.0f} s; {folder} is complete"]

    def upload() -> None:
        try:
            if not sys.stderr.isatty():
                utils.disable_progress_bars()
            api = huggingface_hub.HfApi()
            repo_id = api.create_repo(repo, exist_ok=True, private=private or None).repo_id
            api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message)
            said.append(f"pushed {folder} to {constants.ENDPOINT}/{repo_id}")
        except Exception as error:  # the client, its HTTP library and its storage library each raise their own kinds
            if huggingface_hub.get_token() is None:
                said.append(f"not pushed: no login; run `hf auth login` or set HF_TOKEN, then push {folder}")
            else:
                text = " ".join(str(error).split()) or type(error).__name__
                said.append(f"not pushed: {text if len(text) <= 200 else text[:199] + '…'}; {folder} is complete")

    uploading = threading.Thread(target=upload, daemon=True)
    uploading.start()
    until = time.monotonic() + PATIENCE
    while uploading.is_alive() and time.monotonic() < until:
        uploading.join(0.2)
        if stopped():
            return f"not pushed: stopped before it was; {folder} is complete"
    return said[-1]
