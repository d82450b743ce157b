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

"""The form of CRIU's image files: two words of magic, then messages.

Each message is its size, in 32 bits, and a protobuf.
"""

import collections.abc as cabc
import pathlib
import struct
import typing as ty

_HEAD = 8


def read(path: pathlib.Path, kind: cabc.Callable[[], ty.Any]) -> list[ty.Any]:
    """All messages of an image.

    :param kind: their class, of pycriu's module ``images.pb``
    """
    data = path.read_bytes()
    found = []
    position = _HEAD
    while position < len(data):
        size, = struct.unpack_from('<I', data, position)
        position += 4
        entry = kind()
        entry.ParseFromString(data[position:position + size])
        found.append(entry)
        position += size
    return found


def write(path: pathlib.Path, entries: cabc.Iterable[ty.Any]) -> None:
    """Put messages in the place of those of an image that is there."""
    with path.open('r+b') as f:
        f.seek(_HEAD)
        f.truncate()
        f.writelines(map(_message, entries))


def append(path: pathlib.Path, entries: cabc.Iterable[ty.Any]) -> None:
    """Add messages to an image."""
    with path.open('ab') as f:
        f.writelines(map(_message, entries))


def _message(entry: ty.Any) -> bytes:
    data: bytes = entry.SerializeToString()
    return struct.pack('<I', len(data)) + data
