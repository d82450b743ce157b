# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""An image, or a part of one, as a stream: told by its content, unpacked.
"""

import collections.abc as cabc
import os
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imageformat


class Input:
    """What a descriptor gives: its pieces, and how much it was."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.consumed = 0

    def __iter__(self) -> cabc.Iterator[bytes]:
        while piece := os.read(self._fd, archive.CHUNK):
            self.consumed += len(piece)
            yield piece


def with_head(
    pieces: cabc.Iterator[bytes], size: int
) -> tuple[bytes, cabc.Iterator[bytes]]:
    """Look at the first ``size`` bytes of a stream without taking them."""
    kept: list[bytes] = []
    total = 0
    while total < size and (piece := next(pieces, b'')):
        kept.append(piece)
        total += len(piece)

    def again() -> cabc.Iterator[bytes]:
        yield from kept
        kept.clear()
        yield from pieces

    return b''.join(kept), again()


def decompressed(
    source: Input
) -> tuple[str | None, cabc.Iterator[bytes]]:
    """Return the compression of a stream, and what comes out of it."""
    head, pieces = with_head(iter(source), 6)
    packed = imageformat.compression(head)
    if packed:
        pieces = imageformat.decompress(packed, pieces)
    return packed, pieces


def tar(
    pieces: cabc.Iterator[bytes], packed: str | None, limits: archive.Limits,
    consumed: ty.Callable[[], int], *, empty: bool = False,
) -> archive.Reader:
    """Return the reader of a stream that has to be a tar archive.

    :param packed: the compression around it, for messages
    :param consumed: see :class:`.archive.Reader`
    :param empty: whether it may be one without entries
    :raises ContainerError: see :func:`.imageformat.check_is_tar`
    """
    head, pieces = with_head(pieces, 512)
    if not empty or head.strip(b'\0') or len(head) < 512:
        try:
            imageformat.check_is_tar(head[:512], packed)
        except errors.ContainerError:
            # What else it is takes a longer look.
            head, pieces = with_head(pieces, imageformat.HEAD)
            imageformat.check_is_tar(head, packed)
    return archive.Reader(pieces, limits, consumed)
