"""Image folders: what lies in them, and how a file becomes pixels. Torch-free.

Every image leaves here as 8-bit RGB: EXIF rotation applied, alpha dropped, 16-bit grey scaled to 8 bits, CMYK and
palettes converted. With a size, the centred square is cut out and resized (bilinear, antialiased).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cfamc_cli.errors import CfamcError, ExitCode
