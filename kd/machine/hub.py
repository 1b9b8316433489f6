"""The Hugging Face Hub: whether it can be reached, and the upload of a finished folder."""

import contextlib
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Callable, Iterator

import huggingface_hub
from huggingface_hub import constants, utils

from kd import BadInput, one_line

CONNECT_SECONDS = 8.0       # for the Hub to answer at all
UPLOAD_SECONDS = 600.0      # for an upload; the client itself waits for a silent server for ever


def reachable(timeout: float = CONNECT_SECONDS) -> bool:
    """Whether the Hub (or `HF_ENDPOINT`) answers within `timeout` seconds.

    To be called before a download, because the client retries an unreachable Hub for most of a
    minute. If there is no answer, the client and `datasets` are switched to their offline mode, in
    which they still load what is in their caches, until `online_again` ends.
    """
    if _offline():
        return False
    if not _answers(timeout):
        _set_offline(True)
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads the environment when it is imported
        return False
    return True


@contextlib.contextmanager
def online_again() -> Iterator[None]:
    """Undo at the end what `reachable` has switched off, as a notebook needs that goes on. Also a decorator."""
    before, variable = _offline(), os.environ.get("HF_HUB_OFFLINE")
    try:
        yield
    finally:
        if _offline() != before:
            _set_offline(before)
            os.environ.pop("HF_HUB_OFFLINE", None)
            if variable is not None:
                os.environ["HF_HUB_OFFLINE"] = variable


def _offline() -> bool:
    """Whether the client is in its offline mode."""
    return getattr(constants, "HF_HUB_OFFLINE", False)


def _set_offline(value: bool) -> None:
    """Switch the client, and `datasets` if it is imported. Both read these variables whenever they connect."""
    for module in (constants, sys.modules.get("datasets.config")):
        if module:
            setattr(module, "HF_HUB_OFFLINE", value)


def _answers(timeout: float) -> bool:
    answered = threading.Event()

    def request() -> None:
        try:
            head = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(head, timeout=timeout).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()      # an error status is an answer too
        except (OSError, ValueError):
            pass

    # In a thread, because looking up the host's name ignores the timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def check(repo: str) -> None:
    """Raise BadInput where `--push-to-hub` names no repository; called before training starts."""
    if not repo:
        return
    if re.search(r"hf_\w{20}", repo):   # the message does not repeat the token, and config.json must not hold it
        raise BadInput("--push-to-hub: that is an access token; give the repository, such as someone/student, and the "
                       "token to `hf auth login` or in HF_TOKEN")
    try:
        utils.validate_repo_id(repo)
    except ValueError as error:
        raise BadInput(f"--push-to-hub {repo}: names no repository; give one such as someone/student") from error


def push_folder(folder: str, repo: str, message: str, private: bool = False,
                stopped: Callable[[], Any] = lambda: False) -> str:
    """Upload a saved folder to the Hub's `repo`, which is created if absent; returns one line about it.

    A failed upload must not harm the run whose result it carries. So nothing is raised: every
    failure becomes that line. The upload is given up after UPLOAD_SECONDS, or as soon as `stopped`
    returns something true.
    """
    if _offline() or not _answers(CONNECT_SECONDS):
        return f"not pushed: the Hub at {constants.ENDPOINT} cannot be reached; {folder} is complete"
    outcome = f"not pushed: the Hub did not take it within {UPLOAD_SECONDS:.0f} s; {folder} is complete"

    def upload() -> None:
        nonlocal outcome
        had_bars = not utils.are_progress_bars_disabled()
        try:
            if not sys.stderr.isatty():
                utils.disable_progress_bars()
            api = huggingface_hub.HfApi()
            repo_id = api.create_repo(repo, exist_ok=True, private=private or None).repo_id
            api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message)
            outcome = f"pushed {folder} to {constants.ENDPOINT}/{repo_id}"
        except Exception as error:  # the client, its HTTP library and its storage library raise exceptions of their own
            if huggingface_hub.get_token() is None:
                outcome = f"not pushed: no login; run `hf auth login` or set HF_TOKEN, then push {folder}"
            else:
                outcome = f"not pushed: {one_line(error)}; {folder} is complete"
        finally:
            if had_bars:
                utils.enable_progress_bars()

    thread = threading.Thread(target=upload, daemon=True)
    thread.start()
    deadline = time.monotonic() + UPLOAD_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.2)
        if stopped():
            return f"not pushed: the run was stopped during the upload; {folder} is complete"
    return outcome
