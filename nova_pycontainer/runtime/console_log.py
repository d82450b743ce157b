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

"""The log of a console, which goes with its container to other hosts.

Two files, ``console.log.1`` before ``console.log``, both written by the
keeper; see :class:`.keeper_console.LogRing`.
"""

import base64
import pathlib
import zlib

from nova_pycontainer.runtime import errors

#: Characters of a packed log. It is a part of one frame, see
#: :data:`.migration.channel.MAX_FRAME`.
_PACKED = 512 << 10


def _older(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + '.1')


def read(path: pathlib.Path, max_bytes: int) -> bytes:
    """The end of a log; empty if there is none."""
    parts: list[bytes] = []
    for file in (_older(path), path):
        try:
            parts.append(file.read_bytes())
        except FileNotFoundError:
            continue
    return b''.join(parts)[-max_bytes:]


def pack(path: pathlib.Path, max_bytes: int, room: int = 1 << 30) -> str:
    """The end of a log, as a part of a frame: all that fits.

    :param room: characters that are left in the frame
    """
    data = read(path, max_bytes)
    room = min(room, _PACKED)
    text = _encode(data)
    if len(text) <= room:
        return text
    # What cannot be compressed becomes larger by a third, and a little.
    kept = max(room - 1024, 0) * 5 // 8
    return _encode(data[-kept:] if kept else b'')


def _encode(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def unpack(path: pathlib.Path, packed: object, max_bytes: int) -> None:
    """Write a log as it was packed on another host.

    :param packed: None: an older agent's, that has not sent it
    :param max_bytes: more is cut off at the beginning
    :raises ContainerError: ``invalid``: nothing was packed like this
    """
    if packed is None:
        return
    try:
        # More than the limit of that host is nobody's log.
        data = zlib.decompressobj().decompress(
            base64.b64decode(str(packed), validate=True), 64 << 20)
    except (ValueError, zlib.error) as e:
        raise errors.ContainerError(
            'invalid', 'what came is no log of a console',
            cause=str(e)) from e
    half = max(1, max_bytes // 2)
    for file, part in ((_older(path), data[:-half][-half:]),
                       (path, data[-half:])):
        file.unlink(missing_ok=True)
        if part:
            file.touch(mode=0o600)
            file.write_bytes(part)
