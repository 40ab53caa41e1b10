"""ComfyUI entry point; nothing else lives here.

The guard keeps pytest (which imports this file without a package) and plain imports away from the host's API.
"""

import importlib.util

if __package__ and importlib.util.find_spec("comfy_api"):
    from .nodes import comfy_entrypoint  # noqa: F401

WEB_DIRECTORY = "./js"
