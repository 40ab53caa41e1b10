"""OpenCV, imported by those who use it when they use it."""

from __future__ import annotations

from typing import Any


def opencv() -> Any:
    """The module cv2. Raises ImportError that names the package."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("this needs OpenCV: pip install opencv-python-headless") from error
    return cv2
