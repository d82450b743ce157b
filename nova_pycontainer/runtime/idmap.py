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

"""User namespaces: which host ids a container has, and handles on mappings.

A container gets :data:`RANGE` consecutive host ids. The range is distinct
for each instance and is kept for its whole life, on every host that it
visits: files of the upper directory and CRIU's images carry host ids.
"""

import collections.abc as cabc
import contextlib
import hashlib
import os
import select
import subprocess

from nova_pycontainer.runtime import errors

#: Ids of one container: 0 to nobody (65534) and the one above.
RANGE = 65536


class IdAllocator:
    """Hands out base ids out of ``count`` ranges that start at ``base``.

    It keeps no state: which ranges are taken is what the caller says, who
    reads it from the instances on disk.
    """

    def __init__(self, base: int, count: int) -> None:
        if base % RANGE or base <= 0:
            raise ValueError(f'idmap_base must be a multiple of {RANGE}')
        self._base = base
        self._count = count

    @property
    def unpack_base(self) -> int:
        """The range above all containers' that unpacking runs in."""
        return self._base + self._count * RANGE

    def allocate(
        self, uuid: str, taken: cabc.Collection[int],
        wanted: int | None = None,
    ) -> int:
        """Return a base id for an instance.

        The search starts at a place that depends on the uuid, so that two
        hosts of one cloud rarely give the same range to two instances: a
        range that is occupied on the destination makes a live migration
        impossible.

        :param wanted: the id that the instance has already
        :raises ContainerError: ``no_base_id``
        """
        if wanted is not None:
            if wanted in taken:
                raise errors.ContainerError(
                    'no_base_id',
                    f'the range of ids that starts at {wanted} is taken on '
                    f'this host', uuid=uuid,
                    remedy='Choose another host for this instance')
            if wanted <= 0 or wanted % RANGE:
                raise errors.ContainerError(
                    'invalid', f'{wanted} is not the start of a range of ids',
                    uuid=uuid)
            return wanted
        digest = hashlib.sha256(uuid.encode()).digest()
        start = int.from_bytes(digest[:8], 'big') % self._count
        for i in range(self._count):
            candidate = self._base + (start + i) % self._count * RANGE
            if candidate not in taken:
                return candidate
        raise errors.ContainerError(
            'no_base_id', f'all {self._count} ranges of ids are taken',
            uuid=uuid, remedy='Raise [pycontainer] idmap_count')


@contextlib.contextmanager
def userns_fd(base: int, size: int = RANGE) -> cabc.Iterator[int]:
    """Yield a descriptor of a user namespace that maps 0… to ``base``….

    mount_setattr(2) takes a mapping only in the form of a user namespace, and
    only a process can make one; unshare(1) is that process, since a fork of
    this multi-threaded one is not safe.
    """
    process = subprocess.Popen(
        ['unshare', '--user', 'cat'], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdin and process.stdout and process.stderr
    try:
        # What cat echoes proves that the namespace exists.
        process.stdin.write(b'.')
        ready, _, _ = select.select([process.stdout], [], [], 10)
        if not ready or process.stdout.read(1) != b'.':
            process.kill()
            raise OSError(f'unshare: {process.stderr.read(200)!r}')
        for name in ('uid_map', 'gid_map'):
            with open(f'/proc/{process.pid}/{name}', 'w') as f:
                f.write(f'0 {base} {size}')
        fd = os.open(f'/proc/{process.pid}/ns/user',
                     os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        process.kill()
        process.communicate()
