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

import struct

_HEAD = 8


def head(data: bytes) -> bytes:
    return data[:_HEAD]


def messages(data: bytes) -> list[bytes]:
    found = []
    position = _HEAD
    while position < len(data):
        size, = struct.unpack_from('<I', data, position)
        found.append(data[position + 4:position + 4 + size])
        position += 4 + size
    return found


def message(data: bytes) -> bytes:
    return struct.pack('<I', len(data)) + data
