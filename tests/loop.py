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

"""Block devices for tests: files as loop devices."""

import os
import pathlib
import subprocess

MIB = 1 << 20


class Loop:
    """A block device. Its path is ``path``; it is detached by ``close``."""

    def __init__(self, file: pathlib.Path, size: int = 16 * MIB):
        self.file = file
        with open(file, 'xb') as f:
            os.truncate(f.fileno(), size)
        self.path = _run('losetup', '--show', '--find', str(file))

    def grow(self, size: int):
        os.truncate(self.file, size)
        _run('losetup', '--set-capacity', self.path)

    def read(self, count, offset=0):
        # What others have written through the device is not in our file's
        # cache before it is.
        _run('blockdev', '--flushbufs', self.path)
        with open(self.file, 'rb') as f:
            f.seek(offset)
            return f.read(count)

    def close(self):
        _run('losetup', '--detach', self.path)
        self.file.unlink()


def _run(*argv):
    return subprocess.run(
        argv, check=True, capture_output=True, text=True,
        timeout=30).stdout.strip()
